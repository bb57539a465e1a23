"""How the logits of pages by all their keys are computed: rows that are multiplied at once, and how codes are read."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ragkit.kernels.backend import ceil_div, next_power_of_2, num_processors
from ragkit.kernels.paged_rows import Blocks
from ragkit.kernels.quantized_blocks import QuantizedBlocks

_FEW_CHANNELS = 32  # of keys that only their main directions are kept of
_MOST_PAIRS = 64  # queries of one key head that a program takes


class LogSumsTile(NamedTuple):
    """How the work is cut.

    Attributes:
        rows: of a page, multiplied at once.
        pairs: queries that a program takes through its pages.
        warps, stages: of the program; `stages` pages are under way.
        programs: for each multiprocessor, beyond those that run at once too.
        keys_first: keys are the left operand of the product, so that few queries fill its narrower side.
        in_halves: codes become fp16 in pairs, and queries are fp16 beside them.
    """

    rows: int
    pairs: int
    warps: int
    stages: int
    programs: int
    keys_first: bool = False
    in_halves: bool = False


def log_sums_tile(queries: torch.Tensor, keys: Blocks) -> LogSumsTile:
    """Return how the work of `page_log_sums` is cut.

    Args:
        queries: (tokens, q_heads, head_dim).
        keys: (pages, page_size, kv_heads, head_dim), numbers or codes.
    """
    together = keys.row_group if isinstance(keys, QuantizedBlocks) else keys.shape[1]
    packed = max(1, queries.shape[0] * queries.shape[1] // keys.shape[2])
    if queries.dtype == torch.float32:
        return LogSumsTile(min(16, together), 16, 8, 2, 8)
    if isinstance(keys, QuantizedBlocks) and packed <= 32 and keys.shape[3] <= 128:
        # One warp has a page to itself: it reads each code once, and waits for no other.
        if packed > 8:
            return LogSumsTile(min(32, together), next_power_of_2(packed), 1, 3, 8, keys_first=True, in_halves=True)
        if keys.bits == 8:
            return LogSumsTile(min(32, together), 8, 1, 3, 8, keys_first=True, in_halves=True)
        # Rows that share scales are read at once: twice as many rows a tile took half the time.
        stages = 4 if together <= 32 else 3
        return LogSumsTile(min(64, together), 8, 1, stages, 24, keys_first=True, in_halves=True)
    pairs = max(16, min(_MOST_PAIRS, next_power_of_2(packed)))
    if isinstance(keys, QuantizedBlocks) and pairs == _MOST_PAIRS:
        if keys.shape[3] <= _FEW_CHANNELS:
            return LogSumsTile(min(64, together), pairs, 4, 3, 8, in_halves=True)
        if packed > pairs and keys.shape[3] <= 128:
            return LogSumsTile(min(32, together), 2 * pairs, 8, 3, 4, in_halves=True)
        return LogSumsTile(min(32, together), pairs, 4, 3, 8, in_halves=True)
    return LogSumsTile(min(32, together), pairs, 4, 2, 8)


def pages_at_once(pages: int, tiles: int, tile: LogSumsTile, device: torch.device) -> int:
    """Return how many pages a program reads one after another.

    Args:
        pages: to be read.
        tiles: programs that read each of them.
        tile: how many programs a multiprocessor takes.
        device: where the kernel runs.
    """
    processors = num_processors(device) if device.type == "cuda" else 1
    return max(1, min(pages, ceil_div(pages * tiles, tile.programs * processors)))
