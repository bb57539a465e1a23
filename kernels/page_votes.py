# ruff: noqa: ANN001, ANN201, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""The votes for the pages of a document: each voter's softmax over the pages that compete, added up over all voters.

    votes_page = sum_v 2^(s_v,page - w_v)     s_v,page: base-2 score that voter v gives
    w_v = log2 sum_tile 2^w_v,tile            w_v,tile: base-2 log-sum-exp of its scores in one tile of the pages

Every program that adds up votes needs w_v of all voters. Few tiles it merges itself: what all of them read again costs
less than a launch. Many are merged once, by a launch ahead: at 256 voters and 256 tiles each program would read 262 KB
of weights for 33 KB of scores.

Source: the vote of TokenSelect, arXiv 2411.02886, section 4.2. Cost: reads the scores once; bandwidth bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.kernels.backend import ceil_div, jit, next_power_of_2, tl
from ragkit.kernels.launched import launched

# Weights up to which every program that adds up votes merges all of them itself. So many are 32 KB, which 256 threads
# have under way at once: one wait for the L2 cache, and 8 MB for all programs of 16,384 pages. A launch takes longer,
# 2 to 3 us in a CUDA graph and 10 without. A step of decoding (32 voters, up to 256 tiles) stays below, and takes no
# third launch; a window of a long document (256 voters) does not.
_MERGED_BY_EACH = 8192
_HELD_VOTERS = 64  # whose scores a program holds at a time: few enough registers for four programs a multiprocessor
_MERGED_VOTERS = 8  # whose tiles a program of the launch ahead merges: 32 neighbouring bytes of each tile


class _VotesTile(NamedTuple):
    """How the work of adding up votes is cut.

    Attributes:
        pages: of which a program adds the shares.
        voters: whose scores it holds at a time.
        tiles: whose weights it holds at a time, for each of these voters; 1 where a voter has no more.
        warps: of the program.
    """

    pages: int
    voters: int
    tiles: int
    warps: int


def add_page_votes(
    scores: Tensor, weights: Tensor, out: Tensor, *, bounds: Tensor | None = None, add: bool = False
) -> None:
    """Write how many votes each page gets into `out`, -inf where it does not compete; interpreted or on a GPU.

    Args:
        scores: (voters, pages) fp32 of base 2, contiguous, voters of a row of `out` next to each other; those of pages
            that do not compete are not read.
        weights: (tiles, voters) fp32, contiguous: base-2 log-sum-exp of each voter's scores in each tile of the pages,
            -inf where none competes.
        out: (rows, pages) fp32, contiguous.
        bounds: (3,) int32 on the device: pages from `bounds[0]` up to `bounds[1]` compete; without it all do.
        add: add to what `out` holds of pages that compete.
    """
    (voters, pages), rows, tiles = scores.shape, len(out), len(weights)
    if tiles > 1 and weights.numel() > _MERGED_BY_EACH:
        merged = torch.empty((1, voters), dtype=torch.float32, device=weights.device)
        _merge_tiles_kernel[(ceil_div(voters, _MERGED_VOTERS),)](
            weights, merged, voters, tiles, VOTERS=_MERGED_VOTERS, TILES=256 if weights.is_cuda else 2, num_warps=4
        )
        weights, tiles = merged, 1
    tile = _votes_tile(voters // rows, tiles) if weights.is_cuda else _VotesTile(32, 16, min(tiles, 2), 1)
    _page_votes_kernel[(ceil_div(pages, tile.pages), rows)](
        scores, weights, out if bounds is None else bounds, out, voters // rows, pages, tiles,
        VOTERS=tile.voters, TILES=tile.tiles, PAGES=tile.pages, HAS_BOUNDS=bounds is not None, ADD=add,
        num_warps=tile.warps,
    )  # fmt: skip


def _votes_tile(voters: int, tiles: int) -> _VotesTile:
    """Return how a GPU cuts the work.

    Args:
        voters: of one row.
        tiles: that each program merges for each of them.
    """
    if tiles == 1:
        # 32 pages of a voter are one line of the cache. 16,384 pages are 512 programs: an H100 runs them all at once,
        # and has 8 KB of each under way, 4 MB; what its memory delivers until the first bytes come is 2 to 3 MB.
        pages, held = 32, 1
    else:
        # Each program merges everything again, so there are fewer. Of three sizes, not of all, compilations are few.
        pages, held = 64, 16 if tiles <= 16 else 64 if tiles <= 64 else 256
    voters = max(4, min(_HELD_VOTERS, _MERGED_BY_EACH // held, next_power_of_2(voters)))
    return _VotesTile(pages, voters, held, max(1, min(8, voters * max(pages, held) // 256)))


@jit
def competing_pages(bounds_ptr, pages, HAS_BOUNDS: tl.constexpr):
    """Return the first page that competes, and the one after the last."""
    first, last = 0, pages
    if HAS_BOUNDS:
        first, last = tl.load(bounds_ptr), tl.minimum(tl.load(bounds_ptr + 1), pages)
    return first, last


@jit
def _merged_tiles(weight_ptr, voter, is_voter, stride, tiles, VOTERS: tl.constexpr, TILES: tl.constexpr):
    # (VOTERS,) base-2 log-sum-exp over all tiles; -inf where no page competed. Voters lie next to each other: a thread
    # goes through the tiles of one, and few numbers cross from thread to thread.
    highest = tl.full((VOTERS,), float("-inf"), tl.float32)
    total = tl.zeros((VOTERS,), tl.float32)
    for begin in range(0, tiles, TILES):
        tile = begin + tl.arange(0, TILES)
        mask = (tile < tiles)[:, None] & is_voter[None, :]
        weight = tl.load(weight_ptr + tile[:, None] * stride + voter[None, :], mask=mask, other=float("-inf"))
        new_highest = tl.maximum(highest, tl.max(weight, axis=0))
        # While no page competed the maximum is -inf, and -inf - -inf would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(weight - base[None, :]), axis=0)
        highest = new_highest
    return highest + tl.log2(tl.where(total > 0, total, 1.0))


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("voters", "tiles"))
def _merge_tiles_kernel(weight_ptr, merged_ptr, voters, tiles, VOTERS: tl.constexpr, TILES: tl.constexpr):
    # This program merges the weights of some voters.
    voter = tl.program_id(0) * VOTERS + tl.arange(0, VOTERS)
    merged = _merged_tiles(weight_ptr, voter, voter < voters, voters, tiles, VOTERS, TILES)
    tl.store(merged_ptr + voter, merged, mask=voter < voters)


@launched(do_not_specialize=("voters", "pages", "tiles"))
def _page_votes_kernel(
    score_ptr, weight_ptr, bounds_ptr, out_ptr, voters, pages, tiles,
    VOTERS: tl.constexpr, TILES: tl.constexpr, PAGES: tl.constexpr, HAS_BOUNDS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # This program adds up the shares that all voters of one row give to some pages.
    row = tl.program_id(1)
    start_page = tl.program_id(0) * PAGES
    page = start_page + tl.arange(0, PAGES)
    first, last = competing_pages(bounds_ptr, pages, HAS_BOUNDS)
    is_page = (page >= first) & (page < last)
    shares = tl.zeros((PAGES,), tl.float32)
    if ADD:
        shares = tl.load(out_ptr + row * pages + page, mask=is_page, other=0.0)
    if (first < last) & (start_page < last) & (start_page + PAGES > first):
        # Voters are added up within each thread, and across threads once at the end.
        added = tl.zeros((VOTERS, PAGES), tl.float32)
        for start in range(0, voters, VOTERS):
            is_voter = start + tl.arange(0, VOTERS) < voters
            voter = row * voters + start + tl.arange(0, VOTERS)
            score_at = score_ptr + voter.to(tl.int64)[:, None] * pages + page[None, :]
            scores = tl.load(score_at, mask=is_voter[:, None] & is_page[None, :], other=float("-inf"))
            if TILES == 1:  # the weight of the only tile is that of all pages
                log_sum = tl.load(weight_ptr + voter, mask=is_voter, other=0.0)
            else:
                stride = voters * tl.num_programs(1)
                log_sum = _merged_tiles(weight_ptr, voter, is_voter, stride, tiles, VOTERS, TILES)
                log_sum = tl.where(is_voter, log_sum, 0.0)  # -inf - -inf would be NaN
            added += tl.exp2(scores - log_sum[:, None])
        shares += tl.sum(added, axis=0)
    tl.store(out_ptr + row * pages + page, tl.where(is_page, shares, float("-inf")), mask=page < pages)
