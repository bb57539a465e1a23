"""Scores of pages from vectors or bounds that stand for their keys, by the kernel on a GPU and by torch on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.config import PageVote
from ragkit.kernels.backend import Backend, resolve_backend
from ragkit.kernels.page_scores import KeyBounds, Pooling, page_scores
from ragkit.kvcache.page_selector import Election, pool_votes

_POOLING = {PageVote.SOFTMAX: Pooling.VOTE, PageVote.SUM: Pooling.MEAN, PageVote.MAX: Pooling.MAX}


def score_vectors(queries: Tensor, vectors: Tensor, election: Election, within: Tensor | None = None) -> Tensor:
    """Return (groups, pages) fp32: the vector of a page whose product with a query head is the highest counts.

    Args:
        queries: (queries, q_heads, head_dim).
        vectors: (pages, parts, kv_heads, head_dim); query heads of one key head are neighbours.
        election: how voters share a choice.
        within: (3,) int32 on the device, as `page_scores` takes its bounds: pages outside of them get -inf.
    """
    if resolve_backend(queries) is Backend.TRITON:
        return _by_kernel(queries, vectors, election, within)
    products = head_products(queries, vectors.flatten(0, 1)) * election.scale
    return _pooled(products.unflatten(2, vectors.shape[:2]).amax(dim=3), election, within)


def score_bounds(queries: Tensor, bounds: KeyBounds, election: Election, within: Tensor | None = None) -> Tensor:
    """Return (groups, pages) fp32: a page's score is the highest product that a key of it could have.

    Args:
        queries: (queries, q_heads, head_dim).
        bounds: (pages, parts, kv_heads, head_dim) each.
        election: how voters share a choice.
        within: (3,) int32 on the device, as `page_scores` takes its bounds: pages outside of them get -inf.
    """
    if resolve_backend(queries) is Backend.TRITON:
        return _by_kernel(queries, bounds, election, within)
    wide = queries.float()
    highest = head_products(wide.clamp(min=0), bounds.upper.flatten(0, 1))
    highest += head_products(wide.clamp(max=0), bounds.lower.flatten(0, 1))
    logits = highest.unflatten(2, bounds.lower.shape[:2]).amax(dim=3) * election.scale
    return _pooled(logits, election, within)


def head_products(queries: Tensor, vectors: Tensor) -> Tensor:
    """Return (queries, q_heads, vectors) fp32: every query head's products with the vectors of its key head.

    Args:
        queries: (queries, q_heads, head_dim).
        vectors: (vectors, kv_heads, head_dim).
    """
    count, q_heads, _ = queries.shape
    kv_heads = vectors.shape[1]
    # One product a key head, of the queries of its group with its vectors where they lie.
    grouped = queries.float().unflatten(1, (kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)
    products = torch.bmm(grouped, vectors.float().permute(1, 2, 0))
    return products.view(kv_heads, count, -1, len(vectors)).transpose(0, 1).reshape(count, q_heads, len(vectors))


def _pooled(logits: Tensor, election: Election, within: Tensor | None) -> Tensor:
    if within is None:
        return pool_votes(logits, election)
    page = torch.arange(logits.shape[2], device=logits.device)
    outside = (page < within[0]) | (page >= within[1])
    scores = pool_votes(logits.masked_fill(outside, float("-inf")), election)
    return scores.masked_fill_(outside, float("-inf"))


def _by_kernel(
    queries: Tensor, summaries: Tensor | KeyBounds, election: Election, within: Tensor | None
) -> Tensor:  # fmt: skip
    dtype = summaries.lower.dtype if isinstance(summaries, KeyBounds) else summaries.dtype
    return page_scores(
        queries.to(dtype), summaries, pooling=_POOLING[election.vote], per_head=election.groups > 1,
        scale=election.scale, bounds=within,
    )  # fmt: skip
