"""Selected-query attention under several ways to cut the work, best first: what `attention_tile` should return.

    python benchmarks/tune_selected_attention.py [--rows 32768] [--share 0.15] [--dtype float32]

Every way is compared with the first before it is timed; one that does not fit the device says so.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from kernel_case import attention_flops, selected_positions
from kernel_speed import Clock, measure_ceilings
from report import markdown_table, write_result

from ragkit.kernels.selected_attention import AttentionTile, attention_tile, launch_selected_attention
from ragkit.kernels.testing import assert_matches

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
QUESTION = 60
# Queries times heads in a program, keys at a time, warps, stages. More than about 220 KB of tiles do not fit.
TILES = (
    AttentionTile(128, 128, 8, 3),
    AttentionTile(128, 128, 8, 2),
    AttentionTile(128, 64, 8, 2),
    AttentionTile(128, 64, 8, 3),
    AttentionTile(128, 64, 8, 4),
    AttentionTile(128, 64, 4, 2),
    AttentionTile(128, 32, 4, 3),
    AttentionTile(128, 32, 4, 4),
    AttentionTile(64, 64, 4, 2),
    AttentionTile(64, 64, 4, 3),
    AttentionTile(64, 128, 4, 2),
    AttentionTile(256, 64, 8, 2),
)
# Numbers of twice the size: smaller ones fit.
WIDE_TILES = (
    AttentionTile(64, 16, 8, 2),
    AttentionTile(64, 16, 4, 2),
    AttentionTile(64, 32, 4, 1),
    AttentionTile(64, 32, 4, 2),
    AttentionTile(64, 32, 8, 2),
    AttentionTile(64, 64, 8, 1),
    AttentionTile(64, 64, 8, 2),
    AttentionTile(128, 32, 8, 1),
    AttentionTile(128, 32, 8, 2),
    AttentionTile(128, 64, 8, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--share", type=float, default=0.15)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1 and few rows, tries the script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    clock = Clock(device, tiny=device.type == "cpu")
    dtype = getattr(torch, arguments.dtype)
    tiles = WIDE_TILES if dtype is torch.float32 else TILES
    positions = selected_positions(arguments.rows, arguments.share, QUESTION, device)
    queries = torch.randn(len(positions), Q_HEADS, HEAD_DIM, device=device, dtype=dtype)
    keys, values = (torch.randn(arguments.rows, KV_HEADS, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    work = attention_flops(positions, Q_HEADS, HEAD_DIM)
    ceilings = measure_ceilings(clock)
    print(ceilings, flush=True)
    inputs = (queries, keys, values, positions)
    scale = HEAD_DIM**-0.5
    expected = launch_selected_attention(*inputs, scale=scale, tile=tiles[0]).float()
    rows: list[dict[str, Any]] = []
    for tile in tiles:
        row: dict[str, Any] = tile._asdict()
        try:
            assert_matches(launch_selected_attention(*inputs, scale=scale, tile=tile), expected, reduced=4)
            spent = clock.median(lambda tile=tile: launch_selected_attention(*inputs, scale=scale, tile=tile))
        except Exception as error:  # too much shared memory: Triton's own type, which it does not export
            print(f"{tile}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        row |= {"ms": spent, "tflops": work / spent / 1e9}
        row["percent"] = 100 * row["tflops"] / ceilings["best_dense_tflops"]
        print(row, flush=True)
        rows.append(row)
    rows.sort(key=lambda row: -row["tflops"])
    print(markdown_table(rows, list(rows[0])))
    chosen = attention_tile(HEAD_DIM, dtype, device)
    print(f"\nattention_tile gives {tuple(chosen)}; dense: {ceilings['best_dense']}")
    if not clock.tiny:
        path = write_result("tune_selected_attention", {"ceilings": ceilings, "tiles": rows, **vars(arguments)})
        print(f"raw numbers: {path}")


if __name__ == "__main__":
    main()
