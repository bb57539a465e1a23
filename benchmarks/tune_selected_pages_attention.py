"""Attention of one token over listed pages under several ways to cut the work, best first: what `page_tile` returns.

    python benchmarks/tune_selected_pages_attention.py [--listed 64 256 1024] [--near]
        [--kinds buffer numbers int8 int4]

Kinds: a `buffer` of rows that are turned already, which a decoding step over pages attends to, and pages of a document
as `numbers`, `int8` or `int4`, with a list for each key head. Every way is compared with the first before it is timed;
one that does not fit the device says so. A row without a tile is the merge of the parts alone, which every time holds.
`--near` tries no other rows, warps or stages.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import torch
from kernel_inputs import BLOCK_SIZE, kv_rows, model_shape, normal, quantized, rotary_tables
from kernel_speed import Clock
from torch import Tensor
from tuning import clock_and_ceiling, report_tiles

from ragkit.kernels.gather_pages import PageLists
from ragkit.kernels.merge_splits import merge_splits
from ragkit.kernels.page_tile import PageTile, num_splits, page_tile
from ragkit.kernels.paged_rows import Blocks, stored_as
from ragkit.kernels.selected_pages_attention import launch_few_queries
from ragkit.kernels.testing import assert_matches

KINDS = {"buffer": 0, "numbers": 0, "int8": 8, "int4": 4}
PAGES = 4096  # of the document
# Rows at a time, warps, stages. By the registers and the shared memory that Triton takes for an H100, 3 to 6 programs
# of a buffer fit a multiprocessor, 2 or 3 of rows that are turned; four warps over 64 rows of codes would spill.
CUTS = {
    "buffer": ((64, 4, 2), (64, 4, 3), (64, 8, 2), (32, 4, 2), (32, 4, 4), (32, 2, 3)),
    "numbers": ((64, 4, 2), (64, 8, 2), (32, 4, 2), (32, 4, 3)),
    "int8": ((64, 8, 2), (64, 8, 3), (32, 4, 2), (32, 4, 3)),
    "int4": ((32, 8, 2), (32, 4, 2), (32, 4, 3)),
}
PROGRAMS = {"buffer": (1, 2, 4, 6), "numbers": (1, 2, 3, 4), "int8": (1, 2, 3), "int4": (1, 2, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listed", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--near", action="store_true", help="try other numbers of programs alone, and other merges")
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1, tries the script on few pages")
    arguments = parser.parse_args()
    clock, ceiling = clock_and_ceiling(arguments.device)
    with torch.inference_mode():
        rows = [row for kind in arguments.kinds for row in _tune(kind, arguments, clock, ceiling)]
    name = "tune_selected_pages_attention" + ("_near" if arguments.near else "")
    report_tiles(name, clock, ceiling, rows, arguments)


def _tune(kind: str, arguments: argparse.Namespace, clock: Clock, ceiling: float) -> list[dict[str, Any]]:
    """Return rows of the table for each number of listed pages, the fastest first."""
    lengths: list[int] = arguments.listed
    shape, device = model_shape(clock.device), clock.device
    document = max(lengths) if kind == "buffer" or clock.tiny else PAGES
    plain = [kv_rows(document * BLOCK_SIZE, shape, device).unflatten(0, (-1, BLOCK_SIZE)) for _ in range(2)]
    stored = quantized(plain[0], plain[1], KINDS[kind]) if KINDS[kind] else (plain[0], plain[1])
    queries = normal(1, shape.q_heads, shape.head_dim, shape=shape, device=device)
    found = []
    for listed in lengths:
        last_rows = torch.tensor([listed * BLOCK_SIZE - 1], dtype=torch.int32, device=device)
        if kind == "buffer":
            blocks = torch.arange(listed, dtype=torch.int32, device=device).unsqueeze(0)
            lists = PageLists(blocks, torch.full_like(blocks, -1))
            cos, sin = (part[:1].contiguous() for part in rotary_tables(1, shape, device))
        else:
            heads = range(shape.kv_heads)
            chosen = torch.stack([torch.randperm(document, device=device)[:listed].sort().values for _ in heads])
            starts = torch.arange(0, listed * BLOCK_SIZE, BLOCK_SIZE, dtype=torch.int32, device=device).unsqueeze(0)
            lists = PageLists(chosen.int(), starts)
            cos, sin = rotary_tables(listed * BLOCK_SIZE, shape, device)
        work = sum(pool.nbytes for pool in stored) * listed / document
        rows = _timed(kind, (queries, *stored, lists, last_rows, cos, sin), clock, near=arguments.near)
        for row in rows:
            row |= {"gb_per_s": work / row["us"] / 1e3, "percent": 100 * work / row["us"] / 1e3 / ceiling}
        found += sorted(rows, key=lambda row: row["us"])
        found.append(_merge_alone(kind, listed, queries, stored[0], clock))
    return found


def _timed(kind: str, inputs: tuple[Any, ...], clock: Clock, *, near: bool) -> list[dict[str, Any]]:
    """Return what each way takes that fits."""
    queries, key_pool, value_pool, lists = inputs[:4]
    scale = queries.shape[2] ** -0.5
    listed, together = lists.pages.shape[1], stored_as(key_pool, value_pool)[1]
    chosen = page_tile(key_pool, value_pool, queries.dtype, queries.device, is_turned=kind == "buffer")
    if near:
        ways = [chosen._replace(programs=programs) for programs in PROGRAMS[kind]]
    else:
        turns = (False,) if kind == "buffer" else (True, False)
        cuts = product(CUTS[kind], PROGRAMS[kind], turns)
        ways = [PageTile(*cut, programs, turned) for cut, programs, turned in cuts if cut[0] <= together]
    ways = [chosen, *ways]
    expected = launch_few_queries(*inputs, scale=scale, tile=chosen).float()
    found: list[dict[str, Any]] = []
    seen = set()
    for tile in dict.fromkeys(ways):
        splits = num_splits(key_pool.shape[2], listed, tile, queries.device)
        if (tile._replace(programs=0), splits) in seen:
            continue  # as many parts as with fewer programs: few pages, or the most that are merged
        seen.add((tile._replace(programs=0), splits))
        row: dict[str, Any] = {"kind": kind, "listed": listed, **tile._asdict(), "splits": splits}
        row["chosen"] = "yes" if tile == chosen else ""
        try:
            assert_matches(launch_few_queries(*inputs, scale=scale, tile=tile), expected, reduced=4)
            row["us"] = 1e3 * clock.median(lambda tile=tile: launch_few_queries(*inputs, scale=scale, tile=tile))
        except Exception as error:  # too much shared memory: Triton's own type, which it does not export
            print(f"{kind}, {listed} pages, {tile}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(row, flush=True)
        found.append(row)
    return found


def _merge_alone(kind: str, listed: int, queries: Tensor, key_pool: Blocks, clock: Clock) -> dict[str, Any]:
    """Return what merging 32 parts takes."""
    tokens, q_heads, head_dim = queries.shape
    partial = torch.zeros((tokens, q_heads, 32, head_dim), device=queries.device)
    weights = torch.zeros((tokens, q_heads, 32), device=queries.device)
    out = torch.empty_like(queries)
    spent = 1e3 * clock.median(lambda: merge_splits(partial, weights, out))
    return {"kind": kind, "listed": listed, "splits": 32, "chosen": "the merge alone", "us": spent}


if __name__ == "__main__":
    main()
