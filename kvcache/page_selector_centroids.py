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
from ragkit.kvcache.page_selector import Election, PageRows, Takes, Unfitted, pool_votes

_KEYS_PER_CENTROID = 20
_FINE_PER_COARSE = 8
_GROUPS_AT_ONCE = 64  # that are clustered together
_STEPS = 5  # of K-means: later ones move few keys
_KEPT_SHARE = 0.25  # of the groups, on two levels
_LEAST_KEPT = 16
_PRUNED = 1e4  # below every logit of a group that was kept


class Centroids(Unfitted):
    """One centroid for 20 keys of each group of `group_pages` pages, on one level or two."""

    takes = Takes.BEST
    needs_received = False
    loads_sooner = True

    def __init__(self, levels: int = 1, group_pages: int = 8) -> None:
        self._levels = levels
        self.group_pages = group_pages
        self.selector_id = f"centroids-{levels}-{group_pages}"

    def summarise(self, rows: PageRows, fitted: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Return per group centroids and, on two levels, coarse ones; per page the rows of each centroid.

        That is `counts` (pages, centroids, kv_heads) int32, `fine` (groups, centroids, kv_heads, head_dim), and on two
        levels `sizes` (groups, coarse, kv_heads) int32 and `coarse` (groups, coarse, kv_heads, head_dim).
        """
        whole = len(rows.keys) // self.group_pages * self.group_pages
        groups = rows.keys[:whole].unflatten(0, (-1, self.group_pages)).split(_GROUPS_AT_ONCE) if whole else ()
        rest = [rows.keys[whole:].unsqueeze(0)] if whole < len(rows.keys) else []
        parts = [self._of_groups(some) for some in (*groups, *rest)]
        return tuple(torch.cat(some) for some in zip(*parts, strict=True))

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

    def _of_groups(self, keys: Tensor) -> tuple[Tensor, ...]:
        """Return the summaries of groups of pages (groups, pages, page_size, kv_heads, head_dim) that are alike."""
        groups, pages, page_size, kv_heads, head_dim = keys.shape
        count = max(1, self.group_pages * page_size // _KEYS_PER_CENTROID)  # of a group that is not full as many
        # Every key head of every group is clustered by itself, all of them at once: a head more costs no launch.
        # (tokens, groups * kv_heads, head_dim); of a single key head the groups would stay strided.
        rows = keys.flatten(1, 2).transpose(0, 1).flatten(1, 2).contiguous()
        fine, labels = _clusters(rows, count)
        counts = torch.zeros((pages, groups * kv_heads, count), dtype=torch.int32, device=keys.device)
        of_pages = labels.unflatten(0, (pages, page_size)).transpose(1, 2).long()
        counts.scatter_add_(2, of_pages, torch.ones_like(of_pages, dtype=torch.int32))
        summary = [
            counts.view(pages, groups, kv_heads, count).permute(1, 0, 3, 2).flatten(0, 1),
            fine.view(count, groups, kv_heads, head_dim).transpose(0, 1),
        ]
        if self._levels > 1:
            coarse, belongs = _clusters(fine, max(1, count // _FINE_PER_COARSE))
            sizes = torch.zeros(coarse.shape[:2], dtype=torch.int32, device=keys.device)
            sizes.scatter_add_(0, belongs.long(), counts.sum(dim=0, dtype=torch.int32).T)
            summary.append(sizes.view(-1, groups, kv_heads).transpose(0, 1))
            summary.append(coarse.view(-1, groups, kv_heads, head_dim).transpose(0, 1))
        return tuple(part.contiguous() for part in summary)


def _clusters(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (count, heads, head_dim) centroids in the keys' type, and (tokens, heads) int32 labels."""
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
