"""Pages by clusters of their keys: a few centroids for a group of pages, and how many rows of each page they stand for.

    logit(q, page) = log sum_c n_page,c exp(scale * q . c)

n_page,c is how many of the page's keys belong to centroid c, so this is the attention that the page would receive if
every key were its centroid. On two levels the centroids are clustered again: a quarter of the groups is kept by the
coarse centroids, and only their fine ones are scored.

Source: Squeezed Attention, arXiv 2411.09688, sections 3 and 4: K-means by cosine, one centroid for 20 keys, centroids
are means of the keys as they are. It clusters a fixed prefix as a whole, offline; here every group of pages is
clustered by itself when it is read, so the work grows with the document as it grows. Its published code takes exp
without subtracting the maximum, which turned its threshold into NaN on Qwen2, divides by the size of empty clusters,
and needs as many key heads as query heads; its second level is masked out and not saved. Here the softmax subtracts its
maximum, an empty cluster has no rows and so no weight, and query heads meet the centroids of their own key head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.config import PageVote
from ragkit.kernels.kmeans_assign import Nearness, kmeans_assign
from ragkit.kvcache.page_scoring import head_products
from ragkit.kvcache.page_selector import Election, PageRows, Takes, pool_votes

_KEYS_PER_CENTROID = 20
_FINE_PER_COARSE = 8
_STEPS = 5  # of K-means: later ones move few keys
_KEPT_SHARE = 0.25  # of the groups, on two levels
_LEAST_KEPT = 16
_PRUNED = 1e4  # below every logit of a group that was kept


class Centroids:
    """One centroid for 20 keys of each group of `group_pages` pages, on one level or two."""

    takes = Takes.BEST
    needs_received = False

    def __init__(self, levels: int = 1, group_pages: int = 8) -> None:
        self._levels = levels
        self.group_pages = group_pages
        self.selector_id = f"centroids-{levels}-{group_pages}"

    def summarise(self, rows: PageRows) -> tuple[Tensor, ...]:
        """Return per group centroids and, on two levels, coarse ones; per page the rows of each centroid.

        That is `counts` (pages, centroids, kv_heads) int32, `fine` (groups, centroids, kv_heads, head_dim), and on two
        levels `sizes` (groups, coarse, kv_heads) int32 and `coarse` (groups, coarse, kv_heads, head_dim).
        """
        groups = [self._group(part) for part in rows.keys.split(self.group_pages)]
        return tuple(torch.cat(parts) for parts in zip(*groups, strict=True))

    def score(self, queries: Tensor, summary: tuple[Tensor, ...], first: int, stop: int, election: Election) -> Tensor:
        """Return (groups, pages) fp32."""
        size = self.group_pages
        begin, end = first // size, -(-stop // size)
        groups = torch.arange(begin, end, device=queries.device)
        # Pages of whole groups, those beside the ones that are asked for among them; how many never depends on scores.
        logits = torch.full((*queries.shape[:2], end - begin, size), -_PRUNED, device=queries.device)
        kept = groups
        if self._levels > 1:
            kept, of_groups = self._kept(queries, summary, groups, election)
            logits += of_groups.unsqueeze(3)
        counts, fine = summary[0], summary[1]
        pages = (kept.unsqueeze(1) * size + torch.arange(size, device=queries.device)).clamp(max=len(counts) - 1)
        products = _by_group(queries, fine[kept], election.scale)  # (queries, q_heads, groups, centroids)
        rows = _by_query_head(counts[pages.flatten()], queries.shape[1])  # (q_heads, pages, centroids)
        weights = _log_weight(products.unsqueeze(3), rows.unflatten(1, pages.shape))
        logits.index_copy_(2, kept - begin, weights)
        return pool_votes(logits.flatten(2)[..., first - begin * size : stop - begin * size], election)

    def _kept(
        self, queries: Tensor, summary: tuple[Tensor, ...], groups: Tensor, election: Election
    ) -> tuple[Tensor, Tensor]:
        """Return the groups that all voters together keep, and (queries, q_heads, groups) logits of all."""
        sizes, coarse = summary[2], summary[3]
        products = _by_group(queries, coarse[groups], election.scale)
        logits = _log_weight(products, _by_query_head(sizes[groups], queries.shape[1]))
        votes = pool_votes(logits, Election(PageVote.SOFTMAX, 1, election.scale))[0]
        count = min(len(groups), max(_LEAST_KEPT, round(_KEPT_SHARE * len(groups))))
        return groups[votes.topk(count).indices.sort().values], logits

    def _group(self, keys: Tensor) -> tuple[Tensor, ...]:
        """Return the summary of one group of pages (pages, page_size, kv_heads, head_dim)."""
        pages, page_size = keys.shape[:2]
        tokens = self.group_pages * page_size  # a group that is not full has as many centroids as a full one
        fine, labels = _clusters(keys.flatten(0, 1), max(1, tokens // _KEYS_PER_CENTROID))
        members = torch.nn.functional.one_hot(labels.long().unflatten(0, (pages, -1)), len(fine))
        counts = members.sum(dim=1).transpose(1, 2).int()  # (pages, centroids, kv_heads)
        if self._levels == 1:
            return counts, fine.unsqueeze(0)
        coarse, belongs = _clusters(fine, max(1, len(fine) // _FINE_PER_COARSE))
        weights = counts.sum(dim=0, dtype=torch.int32)
        sizes = torch.zeros(coarse.shape[:2], dtype=torch.int32, device=keys.device)
        sizes.scatter_add_(0, belongs.long(), weights)
        return counts, fine.unsqueeze(0), sizes.unsqueeze(0), coarse.unsqueeze(0)


def _clusters(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (count, kv_heads, head_dim) centroids in the keys' type, and (tokens, kv_heads) int32 labels."""
    start = torch.arange(count, device=keys.device) * len(keys) // count
    centroids = keys[start].contiguous()
    labels = torch.zeros(keys.shape[:2], dtype=torch.int32, device=keys.device)
    for _ in range(_STEPS):
        labels, sums, counts = kmeans_assign(keys, centroids, nearness=Nearness.COSINE)
        means = (sums / counts.clamp(min=1).unsqueeze(2)).to(keys.dtype)
        centroids = torch.where((counts > 0).unsqueeze(2), means, centroids)
    return centroids, labels


def _by_group(queries: Tensor, centroids: Tensor, scale: float) -> Tensor:
    """Return (queries, q_heads, groups, centroids) fp32 products."""
    products = head_products(queries, centroids.flatten(0, 1)) * scale
    return products.view(*products.shape[:2], *centroids.shape[:2])


def _by_query_head(counts: Tensor, q_heads: int) -> Tensor:
    """Return (q_heads, first, centroids) of (first, centroids, kv_heads)."""
    return counts.permute(2, 0, 1).repeat_interleave(q_heads // counts.shape[2], dim=0)


def _log_weight(products: Tensor, rows: Tensor) -> Tensor:
    """Return log sum_c rows_c exp(products_c) over the last dimension; rows of none weigh nothing."""
    return (products + rows.float().log()).logsumexp(dim=-1)
