"""Bounds of the keys of fresh pages at the shape of Llama 3 8B, from the groups of the int8 and int4 codecs."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import BLOCK_SIZE, compiled, kv_rows, model_shape, quantized

from ragkit.kernels.backend import Backend
from ragkit.kernels.page_bounds import page_bounds, page_bounds_torch
from ragkit.kernels.page_scores import KeyBounds
from ragkit.kernels.testing import assert_matches

_PART = 16  # rows


def cases(device: torch.device) -> list[KernelCase]:
    """Return the 8 pages of a window and all pages of 128K rows; on a CPU a few small ones."""
    sizes = [(2048, 8), (2048, 2048)] if device.type == "cuda" else [(8, 3)]
    return [_case(*size, bits, device) for size in sizes for bits in (8, 4)]


def _case(pages: int, listed: int, bits: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    numbers = kv_rows(pages * BLOCK_SIZE, shape, device).unflatten(0, (pages, BLOCK_SIZE))
    keys, _ = quantized(numbers, numbers, bits)
    chosen = torch.randperm(pages, device=device)[:listed].sort().values
    size = (pages, BLOCK_SIZE // _PART, shape.kv_heads, shape.head_dim)
    mine, reference = (
        KeyBounds(*(torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(2))) for _ in range(2)
    )

    def run() -> None:
        page_bounds(keys, chosen, mine, backend=Backend.TRITON)

    def check() -> None:
        run()
        page_bounds_torch(keys, chosen, reference)
        for side, expected in zip(mine, reference, strict=True):
            assert_matches(side, expected.float())

    return KernelCase(
        name=f"page_bounds, int{bits}",
        shape=f"{listed:,} of {pages:,} pages of {BLOCK_SIZE}, {shape.kv_heads} heads of {shape.head_dim}",
        run=run,
        check=check,
        work=(keys.nbytes + sum(side.nbytes for side in mine)) * listed / pages,
        kind="bandwidth",
        baseline_name="torch.compile of decoding and two reductions",
        baseline=compiled(lambda: page_bounds_torch(keys, chosen, reference), device),
    )
