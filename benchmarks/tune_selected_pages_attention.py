"""Attention of one token over listed pages under several ways to cut the work, best first: what `page_tile` returns.

    python benchmarks/tune_selected_pages_attention.py [--listed 64 256 1024] [--near | --graph]
        [--kinds buffer numbers int8 int4]

Kinds: a `buffer` of rows that are turned already, which a decoding step over pages attends to, and pages of a document
as `numbers`, `int8` or `int4`, with a list for each key head. Every way is compared with the first before it is timed;
one that does not fit the device says so. A row without a tile is the merge of the parts alone, which every time holds.
`--near` tries no other rows, warps or stages. `--graph` does not, either: it tries how the merge is launched and when
pages are looked up, as decoding runs them: 32 layers in one CUDA graph, each over KV of its own, every layer of every
way compared with torch's answer to queries that came after the recording. Its rows without a tile are the merge alone,
in such a graph, of as many parts as the way that is chosen has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from kernel_inputs import BLOCK_SIZE, ModelShape, kv_rows, model_shape, normal, quantized, rotary_tables
from kernel_speed import Clock
from torch import Tensor
from tuning import (
    LayersInGraph,
    clock_and_ceiling,
    microseconds_a_layer,
    num_layers,
    report_tiles,
    rows_in_graphs,
)

from ragkit.kernels.gather_pages import PageLists
from ragkit.kernels.merge_splits import MergeLaunch, merge_splits
from ragkit.kernels.page_tile import PageTile, num_splits, page_tile
from ragkit.kernels.paged_rows import Blocks, stored_as
from ragkit.kernels.selected_pages_attention import launch_few_queries, selected_pages_attention_torch
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
# When the merge is launched, whether by warps, whether pages are looked up ahead, whether the kernel itself is launched
# early.
LAUNCHES = (
    (MergeLaunch.AFTER, False, False, False), (MergeLaunch.AT_START, False, False, False),
    (MergeLaunch.AFTER, True, False, False), (MergeLaunch.AT_START, True, False, False),
    (MergeLaunch.AFTER, False, True, False), (MergeLaunch.AFTER, True, True, False),
    (MergeLaunch.AT_START, False, True, False), (MergeLaunch.AT_START, True, True, False),
    (MergeLaunch.AT_END, True, True, False), (MergeLaunch.AT_START, True, True, True),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listed", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--near", action="store_true", help="try other numbers of programs alone")
    only.add_argument("--graph", action="store_true", help="try other launches, in graphs of all layers")
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1, tries the script on few pages")
    arguments = parser.parse_args()
    clock, ceiling = clock_and_ceiling(arguments.device)
    with torch.inference_mode():
        tune = _tune_in_graphs if arguments.graph else _tune
        rows = [row for kind in arguments.kinds for row in tune(kind, arguments, clock, ceiling)]
    name = "tune_selected_pages_attention" + ("_near" if arguments.near else "_graph" if arguments.graph else "")
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
        work = sum(pool.nbytes for pool in stored) * listed / document
        listing = _listing(kind, listed, document, shape, device)
        rows = _timed(kind, (queries, *stored, *listing), clock, near=arguments.near)
        for row in rows:
            row |= {"gb_per_s": work / row["us"] / 1e3, "percent": 100 * work / row["us"] / 1e3 / ceiling}
        found += sorted(rows, key=lambda row: row["us"])
        found.append(_merge_alone(kind, listed, queries, clock))
    return found


def _listing(
    kind: str, listed: int, document: int, shape: ModelShape, device: torch.device
) -> tuple[PageLists, Tensor, Tensor, Tensor]:
    """Return lists of `listed` pages of a document's, the last row that is seen, and the angles."""
    last_rows = torch.tensor([listed * BLOCK_SIZE - 1], dtype=torch.int32, device=device)
    if kind == "buffer":
        blocks = torch.arange(listed, dtype=torch.int32, device=device).unsqueeze(0)
        cos, sin = (part[:1].contiguous() for part in rotary_tables(1, shape, device))
        return PageLists(blocks, torch.full_like(blocks, -1)), last_rows, cos, sin
    heads = range(shape.kv_heads)
    chosen = torch.stack([torch.randperm(document, device=device)[:listed].sort().values for _ in heads])
    starts = torch.arange(0, listed * BLOCK_SIZE, BLOCK_SIZE, dtype=torch.int32, device=device).unsqueeze(0)
    return PageLists(chosen.int(), starts), last_rows, *rotary_tables(listed * BLOCK_SIZE, shape, device)


def _tune_in_graphs(kind: str, arguments: argparse.Namespace, clock: Clock, ceiling: float) -> list[dict[str, Any]]:
    """Return rows of the table for each number of listed pages, the fastest first: microseconds of a layer."""
    found = []
    for listed in arguments.listed:
        layers = [_one_layer(kind, listed, clock.device) for _ in range(num_layers(clock))]
        scale = layers[0][0].shape[2] ** -0.5
        work = sum(pool.nbytes for pool in layers[0][1:3]) * listed / layers[0][1].shape[0]
        ways = [
            ({"kind": kind, "listed": listed, **tile._asdict(), "splits": splits, "chosen": "" if number else "yes"},
             [partial(launch_few_queries, *inputs, scale=scale, tile=tile) for inputs in layers])
            for number, (tile, splits) in enumerate(_launches(kind, *layers[0][:4]))
        ]  # fmt: skip
        definitions = [partial(_definition, inputs, scale) for inputs in layers]
        found += rows_in_graphs(ways, definitions, [inputs[0] for inputs in layers], clock, work, ceiling)
        splits = ways[0][0]["splits"]
        for by_warp in (False, True):
            graph = LayersInGraph([_merge(layers[0][0], splits, by_warp=by_warp)] * len(layers), clock.device)
            alone = {"kind": kind, "listed": listed, "merges_by_warp": by_warp, "splits": splits}
            found.append(alone | {"chosen": "the merge alone", "us": microseconds_a_layer([graph], clock)[0]})
    return found


def _one_layer(kind: str, listed: int, device: torch.device) -> tuple[Any, ...]:
    """Return a layer's inputs; where pages are chosen, every other one of its document."""
    shape = model_shape(device)
    document = listed if kind == "buffer" else 2 * listed
    pools = [kv_rows(document * BLOCK_SIZE, shape, device).unflatten(0, (-1, BLOCK_SIZE)) for _ in range(2)]
    stored = quantized(pools[0], pools[1], KINDS[kind]) if KINDS[kind] else (pools[0], pools[1])
    queries = normal(1, shape.q_heads, shape.head_dim, shape=shape, device=device)
    return queries, *stored, *_listing(kind, listed, document, shape, device)


def _launches(
    kind: str, queries: Tensor, key_pool: Blocks, value_pool: Blocks, lists: PageLists
) -> list[tuple[PageTile, int]]:
    """Return ways to launch today's cut, which comes first, over other numbers of programs, with their parts."""
    chosen = page_tile(key_pool, value_pool, queries.dtype, queries.device, is_turned=kind == "buffer")
    ways = [(chosen, num_splits(key_pool.shape[2], lists.pages.shape[1], chosen, queries.device))]
    for (merge, by_warp, ahead, early), programs in product(LAUNCHES, (chosen.programs, *PROGRAMS[kind])):
        tile = chosen._replace(
            programs=programs, merge=merge, merges_by_warp=by_warp, looks_ahead=ahead, starts_early=early
        )
        splits = num_splits(key_pool.shape[2], lists.pages.shape[1], tile, queries.device)
        # As many parts as with other programs are no other way.
        if all(splits != parts or way._replace(programs=0) != tile._replace(programs=0) for way, parts in ways):
            ways.append((tile, splits))
    return ways


def _definition(inputs: tuple[Any, ...], scale: float) -> Tensor:
    wide = [part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in inputs]
    return selected_pages_attention_torch(*wide, scale=scale)


def _merge(queries: Tensor, splits: int, *, by_warp: bool = False) -> Callable[[], Tensor]:
    """Return what merges as many parts."""
    tokens, q_heads, head_dim = queries.shape
    parts = torch.zeros((tokens, q_heads, splits, head_dim), device=queries.device)
    weights = torch.zeros((tokens, q_heads, splits), device=queries.device)

    def merge() -> Tensor:
        out = torch.empty_like(queries)
        merge_splits(parts, weights, out, by_warp=by_warp)
        return out

    return merge


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


def _merge_alone(kind: str, listed: int, queries: Tensor, clock: Clock) -> dict[str, Any]:
    """Return what merging 32 parts takes."""
    spent = 1e3 * clock.median(_merge(queries, 32))
    return {"kind": kind, "listed": listed, "splits": 32, "chosen": "the merge alone", "us": spent}


if __name__ == "__main__":
    main()
