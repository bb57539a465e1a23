"""How attention of few queries over listed pages is cut: rows that are multiplied at once, and parts of the list.

A program needs registers for the rows that it multiplies, and for angles where they are turned; so many programs as fit
a multiprocessor run at once, and a list has as many parts as that fills the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ragkit.kernels.backend import ceil_div, num_processors
from ragkit.kernels.merge_splits import MergeLaunch
from ragkit.kernels.paged_rows import Blocks, stored_as

_MOST_SPLITS = 128  # parts that are merged


class PageTile(NamedTuple):
    """How the work of few queries is cut.

    Attributes:
        rows: of a page, multiplied at once.
        warps, stages: of the program; `stages` tiles of keys and values are under way.
        programs: for each multiprocessor.
        turns_queries: back by where a tile stands, in the place of its rows forth by the same, where they are fewer.
        merge: when the kernel that merges the parts is launched, where the device leaves a choice.
        merges_by_warp: a program of one warp merges a few channels of a head.
        looks_ahead: a tile's page is looked up while the tile before it is loaded, where pages lie at their own places.
        starts_early: before the kernel ahead has ended, where the device can.
    """

    rows: int
    warps: int
    stages: int
    programs: int
    turns_queries: bool
    merge: MergeLaunch = MergeLaunch.AFTER
    merges_by_warp: bool = False
    looks_ahead: bool = False
    starts_early: bool = False


def page_tile(
    key_pool: Blocks, value_pool: Blocks, dtype: torch.dtype, device: torch.device, *, is_turned: bool
) -> PageTile:
    """Return how the work of few queries is cut, as was best on an H100 for 64 to 1,024 pages of 64 rows.

    Args:
        key_pool, value_pool: numbers, or codes.
        dtype: of the queries.
        device: where the kernel runs.
        is_turned: all rows stand at 0, and need no angles.
    """
    bits, together, _ = stored_as(key_pool, value_pool)  # rows that share a scale, or all of a block
    if device.type != "cuda":
        return PageTile(min(16, together), 4, 1, 1, False)  # interpreted: small pages have several tiles
    if dtype == torch.float32:
        return PageTile(min(16, together), 4, 2, 3, False)
    rows = 64 if is_turned and not bits and key_pool.shape[3] <= 128 else 32
    # All programs run at once: so many fit the registers of a multiprocessor.
    return PageTile(min(rows, together), 4, 3, 2 if is_turned or bits else 3, bits == 8)


def num_splits(programs: int, listed: int, tile: PageTile, device: torch.device) -> int:
    """Return into how many parts the listed pages are split, all of equally many pages but the last.

    Args:
        programs: how many there are for one part.
        listed: pages in a list.
        tile: how many programs a multiprocessor takes.
        device: where the kernel runs.
    """
    processors = num_processors(device) if device.type == "cuda" else 6  # interpreted: enough to test the merge
    wanted = max(1, min(listed, ceil_div(tile.programs * processors, programs), _MOST_SPLITS))
    return ceil_div(listed, ceil_div(listed, wanted))
