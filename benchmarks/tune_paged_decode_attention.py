"""Decode attention over blocks under several ways to cut the work, best first: what `decode_tile` should return.

    python benchmarks/tune_paged_decode_attention.py [--requests 1] [--rows 8192 32768 131072] [--bits 0 8 4]
        [--all | --near | --graph]

Every way is compared with the first, the one that is chosen today, before it is timed; one that does not fit the device
says so. 0 bits are plain numbers. Without `--all` only ways that were near the best before are tried, and those that
add angles; with `--near` the one that is chosen with other numbers of programs, with `--graph` these with other
launches of the merge, as decoding runs them: 32 layers in one CUDA graph, each over KV of its own, every layer
of every way compared with torch's answer to queries that came after the recording.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from typing import Any

import torch
from kernel_inputs import BLOCK_SIZE, empty_pool, kv_rows, model_shape, normal, quantized, rotary_tables
from kernel_speed import Clock
from torch import Tensor
from tuning import clock_and_ceiling, num_layers, report_tiles, rows_in_graphs

from ragkit.kernels.merge_splits import MergeLaunch
from ragkit.kernels.paged_decode_attention import (
    DecodeTile,
    decode_tile,
    launch_paged_decode_attention,
    paged_decode_attention_torch,
)
from ragkit.kernels.paged_rows import entry_bases, stored_as
from ragkit.kernels.testing import assert_matches

# Key heads of a program, rows at a time, warps, stages, whether angles are added. More than about 220 KB of tiles do
# not fit; four warps over 64 rows of codes spill.
LIKELY = {
    0: ((1, 64, 4, 2), (1, 32, 4, 2), (1, 32, 4, 3)),
    8: ((1, 32, 4, 2), (1, 64, 8, 2), (2, 32, 4, 2)),
    4: ((1, 32, 4, 2), (2, 32, 4, 2), (1, 32, 8, 2)),
}
PROGRAMS = (2, 3, 4)  # for each multiprocessor: where fewer fit than there are, the last of them run alone
OTHERS = (
    (1, 64, 8, 2), (1, 32, 2, 2), (2, 64, 8, 2), (2, 64, 8, 3), (2, 64, 4, 2), (2, 32, 4, 2), (2, 32, 4, 3),
    (2, 16, 2, 3), (4, 64, 8, 2), (4, 32, 8, 2), (4, 32, 4, 2), (4, 16, 4, 3), (8, 32, 8, 2),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--bits", type=int, nargs="+", default=[0, 8, 4], choices=[0, 8, 4])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--all", action="store_true", help="try every way")
    only.add_argument("--near", action="store_true", help="try other numbers of programs alone")
    only.add_argument("--graph", action="store_true", help="try other launches of the merge, in graphs of all layers")
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1 and few rows, tries the script")
    arguments = parser.parse_args()
    clock, ceiling = clock_and_ceiling(arguments.device)
    with torch.inference_mode():
        rows = [
            row
            for bits in arguments.bits
            for length in arguments.rows
            for row in (_tune_in_graphs if arguments.graph else _tune)(bits, length, arguments, clock, ceiling)
        ]
    name = "tune_paged_decode_attention" + ("_near" if arguments.near else "_graph" if arguments.graph else "")
    report_tiles(name, clock, ceiling, rows, arguments)


def _tune(bits: int, rows: int, arguments: argparse.Namespace, clock: Clock, ceiling: float) -> list[dict[str, Any]]:
    """Return a row of the table for each way that fits, the fastest first."""
    inputs, work = _one_layer(bits, rows, arguments.requests, clock.device)
    queries, stored, scale = inputs[0], inputs[1:3], inputs[0].shape[2] ** -0.5
    chosen, key_group = decode_tile(queries, *stored), stored_as(*stored)[1]
    if arguments.near:
        ways = [chosen._replace(programs=programs) for programs in PROGRAMS]
    else:
        cuts = dict.fromkeys((*LIKELY[bits], *(OTHERS if arguments.all else ())))
        ways = [DecodeTile(*cut, adds, programs) for cut in cuts for adds in (False, True) for programs in PROGRAMS]
    tiles = dict.fromkeys([chosen, *ways])
    fitting = [tile for tile in tiles if tile.rows <= key_group and stored[0].shape[2] % tile.heads == 0]
    options = {"bases": entry_bases(inputs[4]), "scale": scale}
    expected = launch_paged_decode_attention(*inputs, **options, tile=chosen).float()
    found: list[dict[str, Any]] = []
    for tile in fitting:
        row: dict[str, Any] = {
            "bits": bits,
            "length": rows,
            **tile._asdict(),
            "chosen": "yes" if tile == chosen else "",
        }
        try:
            assert_matches(launch_paged_decode_attention(*inputs, **options, tile=tile), expected, reduced=4)
            spent = clock.median(lambda tile=tile: launch_paged_decode_attention(*inputs, **options, tile=tile))
        except Exception as error:  # too much shared memory: Triton's own type, which it does not export
            print(f"{bits} bits, {tile}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        row |= {"ms": spent, "gb_per_s": work / spent / 1e6, "percent": 100 * work / spent / 1e6 / ceiling}
        print(row, flush=True)
        found.append(row)
    for row in found:
        row["times"] = found[0]["ms"] / row["ms"]  # as fast as the one that is chosen today
    return sorted(found, key=lambda row: row["ms"])


def _one_layer(bits: int, rows: int, requests: int, device: torch.device) -> tuple[tuple[Any, ...], float]:
    """Return a layer's inputs, and the bytes that attending to them reads."""
    shape = model_shape(device)
    entries = -(-rows // BLOCK_SIZE)
    queries = normal(requests, shape.q_heads, shape.head_dim, shape=shape, device=device)
    plain = [empty_pool(requests * entries * BLOCK_SIZE, shape, device) for _ in range(2)]
    for pool in plain:
        pool.copy_(kv_rows(pool.shape[0] * BLOCK_SIZE, shape, device).view(pool.shape))
    stored = quantized(plain[0], plain[1], bits) if bits else (plain[0], plain[1])
    positions = torch.arange(entries * BLOCK_SIZE, device=device, dtype=torch.int32).view(1, entries, BLOCK_SIZE)
    inputs = (
        queries, *stored, torch.randperm(requests * entries, device=device).int().view(requests, entries),
        positions.repeat(requests, 1, 1), torch.full((requests,), entries, device=device, dtype=torch.int32),
        torch.full((requests,), rows - 1, device=device), *rotary_tables(entries * BLOCK_SIZE, shape, device),
    )  # fmt: skip
    return inputs, sum(pool.nbytes for pool in stored) + requests * rows * 4 + rows * shape.head_dim * 4


def _tune_in_graphs(
    bits: int, rows: int, arguments: argparse.Namespace, clock: Clock, ceiling: float
) -> list[dict[str, Any]]:
    """Return a row of the table for each way to launch the merge, the fastest first."""
    requests = arguments.requests
    made = [_one_layer(bits, rows, requests, clock.device) for _ in range(num_layers(clock))]
    layers, work = [inputs for inputs, _ in made], made[0][1]
    scale = layers[0][0].shape[2] ** -0.5
    bases = [entry_bases(inputs[4]) for inputs in layers]
    chosen = decode_tile(*layers[0][:3])
    tiles = [
        chosen._replace(programs=programs, merge=merge, merges_by_warp=by_warp)
        for programs, merge, by_warp in product((chosen.programs, *PROGRAMS), MergeLaunch, (False, True))
    ]
    ways = [
        ({"bits": bits, "length": rows, **tile._asdict(), "chosen": "yes" if tile == chosen else ""},
         [partial(launch_paged_decode_attention, *inputs, bases=base, scale=scale, tile=tile)
          for inputs, base in zip(layers, bases, strict=True)])
        for tile in dict.fromkeys(tiles)
    ]  # fmt: skip
    definitions = [partial(_definition, inputs, scale) for inputs in layers]
    return rows_in_graphs(ways, definitions, [inputs[0] for inputs in layers], clock, work, ceiling)


def _definition(inputs: tuple[Any, ...], scale: float) -> Tensor:
    wide = [part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in inputs]
    return paged_decode_attention_torch(*wide, scale=scale)


if __name__ == "__main__":
    main()
