"""Attention of drafted tokens under several ways to cut the work, best first: what `verify_tile` should return.

    python benchmarks/tune_paged_verify_attention.py [--drafted 1 8 16 32] [--rows 131072]

Every way is compared with the first before it is timed; one that does not fit the device says so. The last row of each
table is a decoding step's attention over the same rows.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from kernel_inputs import BLOCK_SIZE, empty_pool, kv_rows, model_shape, normal, rotary_tables
from kernel_speed import Clock
from tuning import clock_and_ceiling, report_tiles

from ragkit.kernels.paged_decode_attention import paged_decode_attention
from ragkit.kernels.paged_rows import entry_bases
from ragkit.kernels.paged_verify_attention import VerifyTile, launch_paged_verify_attention, verify_tile
from ragkit.kernels.testing import assert_matches

ROWS_AND_WARPS = ((64, 8), (32, 4), (64, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafted", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--rows", type=int, default=131072)
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1 and few rows, tries the script")
    arguments = parser.parse_args()
    clock, ceiling = clock_and_ceiling(arguments.device)
    with torch.inference_mode():
        rows = [row for drafted in arguments.drafted for row in _tune(drafted, arguments.rows, clock, ceiling)]
    report_tiles("tune_paged_verify_attention", clock, ceiling, rows, arguments)


def _tune(drafted: int, rows: int, clock: Clock, ceiling: float) -> list[dict[str, Any]]:
    """Return a row of the table for each way that fits, the fastest first, and one for a decoding step."""
    shape, device = model_shape(clock.device), clock.device
    entries = -(-rows // BLOCK_SIZE)
    own = [
        normal(drafted, heads, shape.head_dim, shape=shape, device=device)
        for heads in (shape.q_heads, shape.kv_heads, shape.kv_heads)
    ]
    pools = [empty_pool(entries * BLOCK_SIZE, shape, device) for _ in range(2)]
    for pool in pools:
        pool.copy_(kv_rows(entries * BLOCK_SIZE, shape, device).view(pool.shape))
    table = torch.randperm(entries, device=device).int().view(1, entries)
    positions = torch.arange(entries * BLOCK_SIZE, device=device, dtype=torch.int32).view(1, entries, BLOCK_SIZE)
    counts, first = torch.full((1,), entries, device=device, dtype=torch.int32), torch.full((1,), rows, device=device)
    chain = [(1 << (index + 1)) - 1 for index in range(drafted)]
    signed = [mask - (1 << 32) if mask >> 31 else mask for mask in chain]
    ancestors = torch.tensor(signed, device=device, dtype=torch.int32)
    angles = rotary_tables(entries * BLOCK_SIZE + 1, shape, device)
    inputs = (*own, *pools, table, positions, counts, first, ancestors, *angles)
    scale = shape.head_dim**-0.5
    work = sum(pool.nbytes for pool in pools)
    chosen = verify_tile(own[0], 1, pools[0], pools[1])
    tiles = dict.fromkeys(
        [chosen]
        + [
            VerifyTile(pairs, size, warps, 2, adds)
            for pairs in sorted({chosen.pairs, max(64, chosen.pairs)})
            for size, warps in ROWS_AND_WARPS
            for adds in (False, True)
        ]
    )
    keywords = {"bases": entry_bases(positions), "scale": scale}
    expected = launch_paged_verify_attention(*inputs, **keywords, tile=chosen).float()
    found: list[dict[str, Any]] = []
    for tile in tiles:
        row: dict[str, Any] = {"drafted": drafted, **tile._asdict(), "chosen": "yes" if tile == chosen else ""}
        try:
            assert_matches(launch_paged_verify_attention(*inputs, **keywords, tile=tile), expected, reduced=4)
            spent = clock.median(lambda tile=tile: launch_paged_verify_attention(*inputs, **keywords, tile=tile))
        except Exception as error:  # too much shared memory: Triton's own type, which it does not export
            print(f"{drafted} tokens, {tile}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        row |= {"ms": spent, "gb_per_s": work / spent / 1e6, "percent": 100 * work / spent / 1e6 / ceiling}
        print(row, flush=True)
        found.append(row)
    found.sort(key=lambda row: row["ms"])
    step = (own[0][:1], *pools, table, positions, counts, first - 1, *angles)
    spent = clock.median(lambda: paged_decode_attention(*step, scale=scale))
    found.append({"drafted": 0, "chosen": "a decoding step", "ms": spent, "gb_per_s": work / spent / 1e6})
    return found


if __name__ == "__main__":
    main()
