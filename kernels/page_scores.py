# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""How well the pages of a document fit some queries, from what was kept of each page's keys.

    s_v,page = scale * best_r q_v . k_page,r                        of vectors that stand for a page's keys
    s_v,page = scale * best_r sum_d max(q_vd lower_d, q_vd upper_d)  of bounds: no key of the part scores higher

v is a voter, a query head of a token; r a part of the page: its parts' scores are added, or the highest counts. Where
lower <= upper the bound is max(q, 0) . upper + min(q, 0) . lower, two products instead of a maximum per channel. All
voters that share a row of the result are pooled: the mean or the maximum of s, or the sum of softmax_page(s_v).
The softmax takes two passes: the first keeps the scores, which are far fewer than the summaries, and the log-sum-exp of
each tile of pages; the second adds up the shares (`page_votes`), and has the tiles merged by a launch ahead of it where
there are many.

Source: representative keys: InfLLM, arXiv 2402.04617, section 3.2; bounds: Quest, arXiv 2406.10774, section 3.2, in
parts of a page: LServe, arXiv 2502.14866, section 3.5; softmax: the vote of TokenSelect, arXiv 2411.02886, section 4.2.
Cost: reads the summaries once; bandwidth bound while tokens * q_heads / kv_heads is at most about 128.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, num_processors, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.page_votes import add_page_votes, competing_pages

_LOG2_E = 1.4426950408889634  # the kernels work with powers of two
_KEPT_SCORES = 1 << 24  # scores that the torch definition, or the vote between its passes, holds at a time: 64 MB


class Pooling(StrEnum):
    """How the scores of all voters become one."""

    MEAN = "mean"
    MAX = "max"
    VOTE = "vote"


class KeyBounds(NamedTuple):
    """The lowest and the highest number of each channel among the keys of a part.

    Attributes:
        lower, upper: (pages, parts, kv_heads, head_dim) alike; nowhere is `lower` above `upper`.
    """

    lower: Tensor
    upper: Tensor


def page_scores(
    queries: Tensor,
    summaries: Tensor | KeyBounds,
    *,
    pooling: Pooling,
    per_head: bool,
    scale: float,
    sum_parts: bool = False,
    bounds: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Return (kv_heads or 1, pages) fp32; -inf where a page does not compete, or nobody votes.

    Args:
        queries: (tokens, q_heads, head_dim) in the type of the summaries; heads of a token contiguous. Where scores are
            products of one vector a page, the mean of the queries scores as the mean of their scores, and costs less.
        summaries: (pages, parts, kv_heads, head_dim) vectors that stand for the keys of a page: one mean, several
            representatives, centroids; or bounds of its parts. Pages at any stride, the rest contiguous.
        pooling: of all tokens and heads that share a row.
        per_head: one row a key head, of the query heads that share it; else one row of all.
        scale: factor on the products, above zero.
        sum_parts: add up the scores of a page's parts; else the highest counts.
        bounds: (3,) int32 on the device, as `page_top_k` takes them: pages from `bounds[0]` up to `bounds[1]` compete,
            and no others are read; without it all do.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    lower, upper = summaries if isinstance(summaries, KeyBounds) else (summaries, None)
    _check_inputs(queries, lower, upper, scale, bounds)
    pages, parts, kv_heads, head_dim = lower.shape
    if resolve_backend(queries, backend) is Backend.TORCH:
        return page_scores_torch(
            queries, summaries, pooling=pooling, per_head=per_head, scale=scale, sum_parts=sum_parts, bounds=bounds
        )
    rows = kv_heads if per_head else 1
    packed, group = queries.shape[0] * queries.shape[1] // kv_heads, queries.shape[1] // kv_heads
    if packed == 0 or pages == 0:
        return torch.full((rows, pages), float("-inf"), device=queries.device)
    out = torch.empty((rows, pages), dtype=torch.float32, device=queries.device)
    constants = {
        "GROUP": group, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "DIM_PADDED": max(16, next_power_of_2(head_dim)),
        "PARTS": parts, "IS_BOUNDS": upper is not None, "SUM_PARTS": sum_parts, "HAS_BOUNDS": bounds is not None,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        "UPCAST": not queries.is_cuda,
    }  # fmt: skip
    high, span = lower if upper is None else upper, out if bounds is None else bounds
    if pooling is Pooling.VOTE:
        _vote(queries, lower, high, bounds, out, scale * _LOG2_E, constants)
        return out
    pairs, tile = _tile_sizes(packed, lower, rows)
    _page_scores_kernel[(ceil_div(pages, tile), rows)](
        queries, lower, high, span, out, scale if pooling is Pooling.MAX else scale / (packed * kv_heads // rows),
        packed, pages, queries.stride(0), lower.stride(0),
        **constants, HEADS=kv_heads // rows, PAIRS=pairs, PAGES=tile, MAX=pooling is Pooling.MAX,
        num_warps=8 if pairs > 64 else 4, num_stages=2,
    )  # fmt: skip
    return out


def page_scores_torch(
    queries: Tensor,
    summaries: Tensor | KeyBounds,
    *,
    pooling: Pooling,
    per_head: bool,
    scale: float,
    sum_parts: bool = False,
    bounds: Tensor | None = None,
) -> Tensor:
    """Return what `page_scores` returns: the definition, in fp32, some tokens at a time."""
    pages, parts, kv_heads, _ = (summaries.lower if isinstance(summaries, KeyBounds) else summaries).shape
    rows = kv_heads if per_head else 1
    tokens, q_heads = queries.shape[:2]
    if tokens * q_heads == 0 or pages == 0:
        return torch.full((rows, pages), float("-inf"), device=queries.device)
    page = torch.arange(pages, device=queries.device)
    outside = torch.zeros_like(page, dtype=torch.bool) if bounds is None else (page < bounds[0]) | (page >= bounds[1])
    # (kv_heads, head_dim, parts * pages) each; what lies outside may never have been written.
    sides = [
        side.float().masked_fill(outside[:, None, None, None], 0).permute(2, 3, 1, 0).flatten(2)
        for side in (summaries if isinstance(summaries, KeyBounds) else (summaries,))
    ]
    pooled = torch.full((rows, pages), float("-inf") if pooling is Pooling.MAX else 0.0, device=queries.device)
    at_once = max(1, _KEPT_SCORES // (q_heads * parts * pages))
    for start in range(0, tokens, at_once):
        voters = queries[start : start + at_once].float().unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        if len(sides) == 1:
            scores = torch.bmm(voters, sides[0])
        else:
            scores = torch.bmm(voters.clamp(min=0), sides[1]).baddbmm_(voters.clamp(max=0), sides[0])
        scores = scores.unflatten(2, (parts, pages))
        scores = (scores.sum(dim=2) if sum_parts else scores.amax(dim=2)) * scale
        scores = scores.reshape(rows, -1, pages).masked_fill_(outside, float("-inf"))
        if pooling is Pooling.MAX:
            pooled = torch.maximum(pooled, scores.amax(dim=1))
        elif pooling is Pooling.MEAN:
            pooled += scores.sum(dim=1) * rows / (tokens * q_heads)
        else:
            pooled += scores.softmax(dim=2).sum(dim=1)
    return pooled.masked_fill_(outside, float("-inf"))


def _vote(
    queries: Tensor,
    lower: Tensor,
    high: Tensor,
    bounds: Tensor | None,
    out: Tensor,
    scale_log2: float,
    constants: dict[str, int],
) -> None:
    """Write the sum of all voters' shares into `out`, some tokens at a time: scores are kept between the passes."""
    pages, _, kv_heads, _ = lower.shape
    tokens, q_heads = queries.shape[:2]
    at_once = min(tokens, max(1, _KEPT_SCORES // (q_heads * pages)))
    group = q_heads // kv_heads
    pairs, tile = _tile_sizes(at_once * group, lower, kv_heads)
    tiles = ceil_div(pages, tile)
    kept = torch.empty((at_once * q_heads, pages), dtype=torch.float32, device=queries.device)
    for start in range(0, tokens, at_once):
        part = queries[start : start + at_once]
        scores, packed = kept[: len(part) * q_heads], len(part) * group
        weights = torch.empty((tiles, len(scores)), dtype=torch.float32, device=queries.device)
        _voter_scores_kernel[(tiles, kv_heads, ceil_div(packed, pairs))](
            part, lower, high, out if bounds is None else bounds, scores, weights, scale_log2, packed, pages,
            queries.stride(0), lower.stride(0),
            **constants, PAIRS=pairs, PAGES=tile, num_warps=8 if pairs > 64 else 4, num_stages=2,
        )  # fmt: skip
        add_page_votes(scores, weights, out, bounds=bounds, add=start > 0)


def _tile_sizes(packed: int, lower: Tensor, programs: int) -> tuple[int, int]:
    """Return how many voters and how many pages a program holds.

    Args:
        packed: voters of one key head.
        lower: the summaries.
        programs: that there are for one tile of pages.
    """
    if lower.device.type != "cuda":
        return 16, 16  # interpreted: small inputs have several tiles
    wide = lower.dtype == torch.float32
    pairs = max(16, min(16 if wide else 64 if lower.shape[3] > 128 else 128, next_power_of_2(packed)))
    tile = 32 if wide or lower.shape[3] > 128 else 64
    while tile > 16 and ceil_div(lower.shape[0], tile) * programs < 2 * num_processors(lower.device):
        tile //= 2
    return pairs, tile


def _check_inputs(queries: Tensor, lower: Tensor, upper: Tensor | None, scale: float, bounds: Tensor | None) -> None:
    if lower.dim() != 4 or (lower.numel() and lower.stride()[1:] != lower[:1].contiguous().stride()[1:]):
        raise KernelInputError(
            f"summaries must be (pages, parts, kv_heads, head_dim), a page contiguous, got {tuple(lower.shape)}"
        )
    if upper is not None and (upper.shape, upper.stride(), upper.dtype) != (lower.shape, lower.stride(), lower.dtype):
        raise KernelInputError(f"both bounds must be {tuple(lower.shape)} alike, got {tuple(upper.shape)}")
    parts, kv_heads, head_dim = lower.shape[1:]
    if queries.dim() != 3 or queries.shape[2] != head_dim:
        raise KernelInputError(f"queries must be (tokens, heads, {head_dim}), got {tuple(queries.shape)}")
    if queries.numel() and queries.stride()[1:] != (head_dim, 1):
        raise KernelInputError(f"the heads of one token of queries must be contiguous, got strides {queries.stride()}")
    if queries.dtype != lower.dtype:
        raise KernelInputError(f"queries and summaries must share a type, got {queries.dtype} and {lower.dtype}")
    if parts == 0 or kv_heads == 0 or queries.shape[1] % kv_heads:
        raise KernelInputError(f"{queries.shape[1]} query heads cannot score {parts} parts of {kv_heads} key heads")
    if not scale > 0:
        raise KernelInputError(f"scale must be above zero, got {scale}")
    if bounds is not None and (bounds.shape != (3,) or bounds.dtype != torch.int32 or not bounds.is_contiguous()):
        raise KernelInputError(f"bounds must be (3,) int32, got {tuple(bounds.shape)} {bounds.dtype}")


@jit
def _pair_scores(
    query_ptr, key_ptr, upper_ptr, pair, packed, page, is_page, kv_head, stride_qt, stride_kp,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr, IS_BOUNDS: tl.constexpr, SUM_PARTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # The scores (pairs, pages) fp32 of some queries (heads within tokens) of one key head, without the scale.
    dim = tl.arange(0, DIM_PADDED)
    token, head = pair // GROUP, kv_head * GROUP + pair % GROUP
    query_at = query_ptr + token.to(tl.int64)[:, None] * stride_qt + head[:, None] * HEAD_DIM + dim[None, :]
    query = tl.load(query_at, mask=(pair < packed)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    above = tl.where(query > 0, query, 0.0).to(query.dtype)
    mask = is_page[:, None] & (dim < HEAD_DIM)[None, :]
    key_at = page.to(tl.int64)[:, None] * stride_kp + kv_head * HEAD_DIM + dim[None, :]
    scores = tl.full((pair.shape[0], page.shape[0]), 0.0 if SUM_PARTS else float("-inf"), tl.float32)
    for part in range(PARTS):
        at = key_at + part * (KV_HEADS * HEAD_DIM)
        key = tl.load(key_ptr + at, mask=mask, other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
        if IS_BOUNDS:
            upper = tl.load(upper_ptr + at, mask=mask, other=0.0)
            if UPCAST:
                upper = upper.to(tl.float32)
            of_part = tl.dot(above, tl.trans(upper), input_precision="ieee")
            of_part = tl.dot((query - above).to(query.dtype), tl.trans(key), acc=of_part, input_precision="ieee")
        else:
            of_part = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = scores + of_part if SUM_PARTS else tl.maximum(scores, of_part)
    return scores


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("packed", "pages"))
def _page_scores_kernel(
    query_ptr, key_ptr, upper_ptr, bounds_ptr, out_ptr, scale, packed, pages, stride_qt, stride_kp,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr, IS_BOUNDS: tl.constexpr, SUM_PARTS: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    UPCAST: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, PAGES: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    # This program pools what all voters of one row say about some pages.
    tile, row = tl.program_id(0), tl.program_id(1)
    page = tile * PAGES + tl.arange(0, PAGES)
    first, last = competing_pages(bounds_ptr, pages, HAS_BOUNDS)
    is_page = (page >= first) & (page < last)
    pooled = tl.full((PAGES,), float("-inf") if MAX else 0.0, tl.float32)
    if (first < last) & (tile * PAGES < last) & (tile * PAGES + PAGES > first):
        for kv_head in range(row * HEADS, row * HEADS + HEADS):
            for start in range(0, packed, PAIRS):
                pair = start + tl.arange(0, PAIRS)
                scores = _pair_scores(
                    query_ptr, key_ptr, upper_ptr, pair, packed, page, is_page, kv_head, stride_qt, stride_kp,
                    GROUP, KV_HEADS, HEAD_DIM, DIM_PADDED, PARTS, IS_BOUNDS, SUM_PARTS, UPCAST,
                )  # fmt: skip
                if MAX:
                    scores = tl.where((pair < packed)[:, None], scores, float("-inf"))
                    pooled = tl.maximum(pooled, tl.max(scores, axis=0))
                else:  # queries beyond the last are zeros, and so are their scores
                    pooled += tl.sum(scores, axis=0)
    out = tl.where(is_page, pooled * scale, float("-inf"))
    tl.store(out_ptr + row * pages + page, out, mask=page < pages)


@launched(do_not_specialize=("packed", "pages"))
def _voter_scores_kernel(
    query_ptr, key_ptr, upper_ptr, bounds_ptr, score_ptr, weight_ptr, scale_log2, packed, pages, stride_qt, stride_kp,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    PARTS: tl.constexpr, IS_BOUNDS: tl.constexpr, SUM_PARTS: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    UPCAST: tl.constexpr, PAIRS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    # This program scores some pages for some queries of one key head, and keeps the base-2 log-sum-exp of each query.
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    pair = tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)
    page = tile * PAGES + tl.arange(0, PAGES)
    first, last = competing_pages(bounds_ptr, pages, HAS_BOUNDS)
    is_page = (page >= first) & (page < last)
    voter = (kv_head * packed + pair).to(tl.int64)
    log_sum = tl.full((PAIRS,), float("-inf"), tl.float32)
    if (first < last) & (tile * PAGES < last) & (tile * PAGES + PAGES > first):
        scores = _pair_scores(
            query_ptr, key_ptr, upper_ptr, pair, packed, page, is_page, kv_head, stride_qt, stride_kp,
            GROUP, KV_HEADS, HEAD_DIM, DIM_PADDED, PARTS, IS_BOUNDS, SUM_PARTS, UPCAST,
        )  # fmt: skip
        scores = tl.where(is_page[None, :], scores * scale_log2, float("-inf"))
        mask = (pair < packed)[:, None] & is_page[None, :]
        tl.store(score_ptr + voter[:, None] * pages + page[None, :], scores, mask=mask)
        highest = tl.max(scores, axis=1)  # finite: a tile that overlaps the bounds has a page within them
        log_sum = highest + tl.log2(tl.sum(tl.exp2(scores - highest[:, None]), axis=1))
    tl.store(weight_ptr + tile * (tl.num_programs(1) * packed) + voter, log_sum, mask=pair < packed)
