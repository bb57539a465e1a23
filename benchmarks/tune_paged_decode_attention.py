"""Decode attention over blocks under several ways to cut the work, best first: what `decode_tile` should return.

    python benchmarks/tune_paged_decode_attention.py [--requests 1] [--rows 32768] [--bits 0 8 4]

Every way is compared with the first before it is timed; one that does not fit the device says so. 0 bits are plain
numbers.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from kernel_inputs import BLOCK_SIZE, empty_pool, kv_rows, model_shape, normal, quantized, rotary_tables
from kernel_speed import COPY_BYTES, Clock, copy_rate
from report import markdown_table, write_result

from ragkit.kernels.paged_decode_attention import DecodeTile, decode_tile, launch_paged_decode_attention
from ragkit.kernels.paged_rows import stored_as
from ragkit.kernels.testing import assert_matches

# Key heads of a program, rows at a time, warps, stages. More than about 220 KB of tiles do not fit.
TILES = (
    DecodeTile(1, 64, 8, 2),
    DecodeTile(1, 64, 4, 2),
    DecodeTile(1, 32, 4, 2),
    DecodeTile(1, 32, 2, 2),
    DecodeTile(2, 64, 8, 2),
    DecodeTile(2, 64, 8, 3),
    DecodeTile(2, 64, 4, 2),
    DecodeTile(2, 32, 4, 2),
    DecodeTile(2, 32, 4, 3),
    DecodeTile(2, 16, 2, 3),
    DecodeTile(4, 64, 8, 2),
    DecodeTile(4, 32, 8, 2),
    DecodeTile(4, 32, 4, 2),
    DecodeTile(4, 16, 4, 3),
    DecodeTile(8, 32, 8, 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--bits", type=int, nargs="+", default=[0, 8, 4], choices=[0, 8, 4])
    parser.add_argument("--device", default="cuda", help="cpu, with TRITON_INTERPRET=1 and few rows, tries the script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    clock = Clock(device, tiny=device.type == "cpu")
    ceiling = copy_rate(clock, (1 << 20) if clock.tiny else COPY_BYTES)
    print(f"a copy moves {ceiling:.0f} GB/s, read and written", flush=True)
    rows = [row for bits in arguments.bits for row in _tune(bits, arguments.requests, arguments.rows, clock, ceiling)]
    print(markdown_table(rows, list(rows[0])))
    if not clock.tiny:
        path = write_result("tune_paged_decode_attention", {"copy_gb_per_s": ceiling, "tiles": rows, **vars(arguments)})
        print(f"raw numbers: {path}")


def _tune(bits: int, requests: int, rows: int, clock: Clock, ceiling: float) -> list[dict[str, Any]]:
    """Return a row of the table for each way that fits, the fastest first."""
    shape, device = model_shape(clock.device), clock.device
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
    scale = shape.head_dim**-0.5
    work = sum(pool.nbytes for pool in stored) + requests * rows * 4 + rows * shape.head_dim * 4
    chosen, key_group = decode_tile(queries, *stored), stored_as(*stored)[1]
    tiles = [chosen, *(tile for tile in TILES if tile != chosen)]
    fitting = [tile for tile in tiles if tile.rows <= key_group and shape.kv_heads % tile.heads == 0]
    expected = launch_paged_decode_attention(*inputs, scale=scale, tile=chosen).float()
    found: list[dict[str, Any]] = []
    for tile in fitting:
        row: dict[str, Any] = {"bits": bits, **tile._asdict(), "chosen": "yes" if tile == chosen else ""}
        try:
            assert_matches(launch_paged_decode_attention(*inputs, scale=scale, tile=tile), expected, reduced=4)
            spent = clock.median(lambda tile=tile: launch_paged_decode_attention(*inputs, scale=scale, tile=tile))
        except Exception as error:  # too much shared memory: Triton's own type, which it does not export
            print(f"{bits} bits, {tile}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        row |= {"ms": spent, "gb_per_s": work / spent / 1e6, "percent": 100 * work / spent / 1e6 / ceiling}
        print(row, flush=True)
        found.append(row)
    return sorted(found, key=lambda row: row["ms"])


if __name__ == "__main__":
    main()
