# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""The pages of highest score, found on the device: which ones never becomes known to the host.

    chosen = the k first pages by (score' descending, page ascending), in ascending order
    score'_p = score_p + follow * score_(p - 1)   where page p - 1 competes as well, and is the neighbour of p

What is asked for may begin in one page and end in the next, which no query looks at before it has read the first: a
number whose key stands at a page's end was lost with all but its first digit. So a page has a part in the score of the
one before it.

The k-th highest score is found by halving: numbers are mapped to integers of the same order, and each step counts the
pages at or above the middle of where it may be, 32 steps at most. A count of 32 bits is one instruction for the lanes
of a warp, and counts of several thresholds in 64 bits are many. A threshold that k pages reach and no more ends it,
after about 20 steps among 16,384 different scores. Equal scores go to the lower page, so that every run chooses the
same pages. One program holds one row of scores; launches depend on shapes alone, so a CUDA graph replays them for other
scores and bounds.

Source: bucket and cutting-plane selection, Alabi et al., "Fast k-selection algorithms for graphics processing units",
2012; choosing pages with it: Quest, arXiv 2406.10774, section 3.3. Cost: reads the scores once; latency bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched

MOST_PAGES = 1 << 16  # scores that one program can hold
MOST_CHOSEN = 1 << 13
_NOTHING_BITS = (0xFF800000 ^ 0x7FFFFFFF) - (1 << 32)  # the integer of -inf


def page_top_k(
    scores: Tensor,
    k: int,
    *,
    bounds: Tensor | None = None,
    keep_rest: bool = False,
    follow: float = 0.0,
    listed: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(pages, counts)`: (rows, k) int32 ascending, and (rows,) int32, how many of the k were found.

    Entries past a row's count are 0. Pages that score -inf or NaN are never chosen.

    Args:
        scores: (rows, pages) fp32, contiguous; rows are chosen for apart.
        k: pages to choose, at most `MOST_CHOSEN`.
        bounds: (3,) int32 on the device: `first`, `last` and `end`. Pages from `first` up to `last` compete; without it
            all do.
        keep_rest: the pages before `first` (sinks) and from `last` up to `end` (the local window) are chosen before
            all others, whatever they score, and count towards k; else they are left out.
        follow: part of a page's score that the next one has as well; only scores from zero up can be shared so.
        listed: (rows, pages) int32: which pages the scores are of, ascending; without it they are neighbours. What is
            chosen are places in this list.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(scores, k, bounds, listed)
    if resolve_backend(scores, backend) is Backend.TORCH:
        return page_top_k_torch(scores, k, bounds=bounds, keep_rest=keep_rest, follow=follow, listed=listed)
    rows, pages = scores.shape
    chosen = torch.empty((rows, k), dtype=torch.int32, device=scores.device)
    counts = torch.empty(rows, dtype=torch.int32, device=scores.device)
    if rows == 0:
        return chosen, counts
    held = max(32, next_power_of_2(pages if rows == 1 or pages % 4 == 0 else pages + 3))
    _page_top_k_kernel[(rows,)](
        scores, counts if bounds is None else bounds, counts if listed is None else listed, chosen, counts, pages, k,
        follow,
        PAGES=held, HAS_BOUNDS=bounds is not None, KEEP_REST=keep_rest, FOLLOWS=follow > 0,
        IS_LISTED=listed is not None, NOTHING_BITS=_NOTHING_BITS, MOST=next_power_of_2(k),
        num_warps=min(32, max(4, held // 512)),
    )  # fmt: skip
    return chosen, counts


def page_top_k_torch(
    scores: Tensor,
    k: int,
    *,
    bounds: Tensor | None = None,
    keep_rest: bool = False,
    follow: float = 0.0,
    listed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `page_top_k` returns: the definition."""
    pages = scores.shape[1]
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    if follow > 0:
        before = scores[:, :-1].clamp(min=0)
        place = torch.arange(pages - 1, device=scores.device)
        if bounds is not None:
            before = torch.where((place >= bounds[0]) & (place < bounds[1]), before, 0)
        if listed is not None:
            before = torch.where(listed[:, 1:] - listed[:, :-1] == 1, before, 0)
        scores = scores + torch.nn.functional.pad(before * follow, (1, 0))
    if bounds is not None:
        first, last, end = bounds.unbind()
        page = torch.arange(pages, device=scores.device)
        rest = torch.where((page < end) & keep_rest, float("inf"), float("-inf"))
        scores = torch.where((page >= first) & (page < last), scores, rest)
    scores = torch.nn.functional.pad(scores, (0, max(0, k - pages)), value=float("-inf"))
    best, order = (part[:, :k] for part in torch.sort(scores, dim=1, descending=True, stable=True))
    found = best > float("-inf")
    counts = found.sum(dim=1, dtype=torch.int32)
    ascending = torch.where(found, order, scores.shape[1]).sort(dim=1).values
    return torch.where(torch.arange(k, device=scores.device) < counts[:, None], ascending, 0).int(), counts


def _check_inputs(scores: Tensor, k: int, bounds: Tensor | None, listed: Tensor | None) -> None:
    if scores.dim() != 2 or scores.dtype != torch.float32 or not scores.is_contiguous():
        raise KernelInputError(
            f"scores must be (rows, pages) fp32, contiguous, got {tuple(scores.shape)} {scores.dtype}"
        )
    if scores.shape[1] > MOST_PAGES:
        raise KernelInputError(f"at most {MOST_PAGES:,} pages can be chosen from, got {scores.shape[1]:,}")
    if not 1 <= k <= MOST_CHOSEN:
        raise KernelInputError(f"k must be from 1 to {MOST_CHOSEN:,}, got {k}")
    if bounds is not None and (bounds.shape != (3,) or bounds.dtype != torch.int32 or not bounds.is_contiguous()):
        raise KernelInputError(f"bounds must be (3,) int32, got {tuple(bounds.shape)} {bounds.dtype}")
    if listed is not None and (
        listed.shape != scores.shape or listed.dtype != torch.int32 or not listed.is_contiguous()
    ):
        raise KernelInputError(
            f"listed must be {tuple(scores.shape)} int32, contiguous, got {tuple(listed.shape)} {listed.dtype}"
        )


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("pages", "k"))
def _page_top_k_kernel(
    score_ptr, bounds_ptr, list_ptr, chosen_ptr, count_ptr, pages, k, follow,
    PAGES: tl.constexpr, HAS_BOUNDS: tl.constexpr, KEEP_REST: tl.constexpr, FOLLOWS: tl.constexpr,
    IS_LISTED: tl.constexpr, NOTHING_BITS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    # This program chooses for one row.
    row = tl.program_id(0).to(tl.int64)
    nothing = float("-inf")
    # Counted from a multiple of four, so that a thread holds four neighbours, and adds up to them four at a time.
    begin = row * pages // 4 * 4
    page = tl.arange(0, PAGES) - (row * pages - begin).to(tl.int32)
    at = begin + tl.arange(0, PAGES)
    score = tl.load(score_ptr + at, mask=_is_within(page, 0, pages), other=nothing)
    score = tl.maximum(score, nothing)  # which a NaN becomes
    first, last = 0, pages
    if HAS_BOUNDS:
        first, last = tl.maximum(tl.load(bounds_ptr), 0), tl.minimum(tl.load(bounds_ptr + 1), pages)
    if FOLLOWS:
        has_before = _is_within(page, first + 1, tl.minimum(last + 1, pages))
        if IS_LISTED:
            own = tl.load(list_ptr + at, mask=has_before, other=0)
            has_before &= own - tl.load(list_ptr + at - 1, mask=has_before, other=0) == 1
        before = tl.load(score_ptr + at - 1, mask=has_before, other=0.0)
        score += follow * tl.maximum(before, 0.0)  # neither NaN nor what competes not
    if HAS_BOUNDS:
        rest = nothing
        if KEEP_REST:
            end = tl.minimum(tl.load(bounds_ptr + 2), pages)
            rest = tl.where(_is_within(page, 0, end), float("inf"), nothing)
        score = tl.where(_is_within(page, first, last), score, rest)
    # Integers in the order of the scores: of negative numbers, all bits but the sign's are turned over.
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # there is one zero
    bits ^= (bits >> 31) & 0x7FFFFFFF

    # The highest threshold that k pages reach; where k reach one and no more, that one tells them from the rest.
    low = tl.full((), NOTHING_BITS, tl.int64)  # all reach it
    high = tl.max(bits, axis=0).to(tl.int64) + 1  # none does
    while high - low > 1:
        middle = (low + high) >> 1
        reach = tl.sum((bits >= middle.to(tl.int32)).to(tl.int32), axis=0)
        low = tl.where(reach >= k, middle, low)
        high = tl.where(reach == k, middle + 1, tl.where(reach > k, high, middle))
    threshold = low.to(tl.int32)

    is_above = (bits > threshold).to(tl.int32)
    is_equal = ((bits == threshold) & (threshold > NOTHING_BITS)).to(tl.int32)
    both = (is_above << 17) | is_equal  # both counts in one: of each at most 2^13 and 2^16
    counts = tl.sum(both, axis=0)
    wanted = tl.minimum(k - (counts >> 17), counts & 0x1FFFF)  # of those at the threshold, the first
    before = tl.cumsum(both, axis=0)
    equal_before = before & 0x1FFFF
    is_chosen = (is_above != 0) | ((is_equal != 0) & (equal_before <= wanted))
    place = (before >> 17) + tl.minimum(equal_before, wanted) - 1
    count = (counts >> 17) + wanted
    tl.store(chosen_ptr + row * k + place, page, mask=is_chosen)
    unfilled = tl.arange(0, MOST)
    tl.store(chosen_ptr + row * k + unfilled, unfilled * 0, mask=(unfilled >= count) & (unfilled < k))
    tl.store(count_ptr + row, count)


@jit
def _is_within(page, first, last):
    # first <= page < last, by one comparison.
    return (page - first).to(tl.uint32, bitcast=True) < tl.maximum(last - first, 0).to(tl.uint32)
