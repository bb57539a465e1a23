"""Ways to cut the logits of pages by all their keys, at the shape of Llama 3 8B: which is the fastest on this card.

    python benchmarks/tune_page_log_sums.py [--cases decode ...]
    TRITON_INTERPRET=1 python benchmarks/tune_page_log_sums.py --device cpu     few pages: does the script work?

One token and a question's worth, over a million rows as codes of 4 bits and half of them of 8. Each way is compared
with torch's answer for the first pages before it is timed by events, its caches flushed; GB/s are of codes, scales,
zeros and logits. It takes about a minute, most of it Triton's.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from kernel_inputs import BLOCK_SIZE, ModelShape, kv_rows, model_shape, normal
from kernel_speed import Clock
from torch import Tensor
from tuning import clock_and_ceiling, report_tiles

from ragkit.kernels.backend import Backend
from ragkit.kernels.log_sums_tile import LogSumsTile, log_sums_tile
from ragkit.kernels.page_log_sums import page_log_sums, page_log_sums_torch
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks

SECONDS = 72.0  # after which no other way is begun
CHECKED = 64  # pages whose logits are compared
AT_A_TIME = 1024  # pages that are made and quantised
WORST, TYPICAL = 0.05, 0.01  # nats that a logit may be off at most, and by its RMS


class Case(NamedTuple):
    """What is asked of how many pages: by so many tokens, of codes of so many bits.

    `rank` is how many numbers of a key are kept (all where it is 0), and `group` how many rows share a scale.
    """

    tokens: int
    pages: int
    bits: int
    group: int
    rank: int = 0


CASES = {
    "low-rank": Case(1, 16384, 4, 64, 32), "decode": Case(1, 16384, 4, 32), "decode8": Case(1, 8192, 8, 64),
    "question": Case(64, 16384, 4, 32), "low-rank question": Case(64, 16384, 4, 64, 32), "window": Case(8, 8192, 4, 32),
}  # fmt: skip


def _few(rows: int, warps: int, stages: int, programs: int) -> LogSumsTile:
    return LogSumsTile(rows, 8, warps, stages, programs, keys_first=True, in_halves=True)


def _many(rows: int, pairs: int, warps: int, stages: int, programs: int, keys_first: bool) -> LogSumsTile:
    return LogSumsTile(rows, pairs, warps, stages, programs, keys_first=keys_first, in_halves=True)


# The first of each case is what was chosen before codes were read in halves. Other numbers of programs share what is
# compiled: 16 compilations in all.
TILES: dict[str, tuple[LogSumsTile, ...]] = {
    "low-rank": (
        LogSumsTile(32, 16, 4, 2, 8),
        *(_few(64, 1, 3, programs) for programs in (10, 16, 24, 32)),
        *(_few(32, 1, 3, programs) for programs in (16, 32)),
        _few(64, 1, 5, 16),
    ),
    "low-rank question": (LogSumsTile(32, 64, 4, 2, 8), _many(64, 64, 4, 3, 8, False), _many(32, 32, 1, 3, 16, True)),
    "decode": (
        LogSumsTile(32, 16, 4, 2, 8),
        *(_few(32, 1, 3, programs) for programs in (8, 12, 16, 32)),
        *(_few(32, 1, 4, programs) for programs in (8, 12, 24)),
        *(_few(32, 1, 2, programs) for programs in (15, 30)),
        _few(32, 1, 5, 9),
    ),
    "decode8": (
        LogSumsTile(32, 16, 4, 2, 8),
        *(_few(64, 1, 3, programs) for programs in (8, 10, 20)),
        *(_few(32, 1, 3, programs) for programs in (8, 10, 16, 20)),
        *(_few(32, 1, 4, programs) for programs in (7, 14)),
    ),
    "question": (
        LogSumsTile(32, 64, 4, 2, 8),
        *(_many(32, 64, 4, 3, programs, False) for programs in (4, 8)),
        _many(32, 128, 8, 3, 4, False), _many(32, 32, 1, 3, 16, True),
    ),
    "window": (
        LogSumsTile(32, 32, 4, 2, 8),
        _many(32, 32, 4, 3, 8, False), *(_many(32, 32, 1, 3, programs, True) for programs in (8, 16)),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1, tries the script on few pages")
    arguments = parser.parse_args()
    end = time.perf_counter() + SECONDS
    clock, ceiling = clock_and_ceiling(arguments.device)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name in arguments.cases:
            rows += sorted(_timed(name, clock, ceiling, end), key=lambda row: row["us"])
    report_tiles("tune_page_log_sums", clock, ceiling, rows, arguments)


def _timed(name: str, clock: Clock, ceiling: float, end: float) -> list[dict[str, Any]]:
    """Return a row for each way that compiles and agrees."""
    tokens, pages, bits, group, rank = CASES[name]
    pages = 5 if clock.tiny else pages
    shape = model_shape(clock.device)
    scale = shape.head_dim**-0.5
    shape = replace(shape, head_dim=rank or shape.head_dim)
    queries = normal(tokens, shape.q_heads, shape.head_dim, shape=shape, device=clock.device)
    keys = _keys(pages, bits, group, shape, clock.device)
    some = QuantizedBlocks(keys.codes[:CHECKED], keys.scales[:CHECKED], keys.zeros[:CHECKED], bits)
    expected = page_log_sums_torch(queries, some, scale=scale)
    work = keys.nbytes + tokens * shape.q_heads * pages * 4
    chosen, found = log_sums_tile(queries, keys), []
    for tile in dict.fromkeys((*TILES[name], chosen)):
        if time.perf_counter() > end:
            print(f"{name}, {tile}: no time is left", flush=True)
            continue
        row: dict[str, Any] = {"case": name, **CASES[name]._asdict(), **tile._asdict()}

        def run(tile: LogSumsTile = tile) -> Tensor:
            return page_log_sums(queries, keys, scale=scale, backend=Backend.TRITON, tile=tile)

        try:
            began = time.perf_counter()
            row |= _errors(run()[..., :CHECKED], expected)
            row["first_s"] = time.perf_counter() - began
            row["us"] = 1e3 * clock.median(run)
        except Exception as error:  # what does not compile, has no room or is wrong
            print(f"{name}, {tile}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        row |= {"gb_per_s": work / row["us"] / 1e3, "percent": 100 * work / row["us"] / 1e3 / ceiling}
        row["chosen"] = "yes" if tile == chosen else ""
        print(row, flush=True)
        found.append(row)
    return found


def _keys(pages: int, bits: int, group: int, shape: ModelShape, device: torch.device) -> QuantizedBlocks:
    """Return random keys as codes, made some pages at a time: numbers of all of them would take gigabytes."""
    parts = []
    for start in range(0, pages, AT_A_TIME):
        count = min(AT_A_TIME, pages - start)
        rows = kv_rows(count * BLOCK_SIZE, shape, device)
        codes = quantize_kv(rows, bits=bits, token_group=group, channel_group=1)
        parts.append([part.unflatten(0, (count, -1)) for part in codes])
    return QuantizedBlocks(*(torch.cat(some) for some in zip(*parts, strict=True)), bits)


def _errors(got: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the largest error and its RMS, in nats."""
    error = (got - expected).abs()
    worst, typical = float(error.max()), float(error.square().mean().sqrt())
    assert worst <= WORST, f"largest error {worst:.2e} nats, allowed {WORST}"
    assert typical <= TYPICAL, f"RMS error {typical:.2e} nats, allowed {TYPICAL}"
    return {"worst": worst, "rms": typical}


if __name__ == "__main__":
    main()
