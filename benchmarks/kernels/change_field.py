"""The field of change propagation over the chunks of one prompt at the shape of Llama 3 8B."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import BLOCK_SIZE, kv_rows, model_shape

from ragkit.kernels.backend import Backend
from ragkit.kernels.change_field import ChunkCells, FieldPlan, change_field, change_field_torch
from ragkit.kernels.paged_rows import FIELD_ROWS
from ragkit.kernels.propagation_plan import plan_propagation
from ragkit.kernels.testing import assert_matches

CHUNK = 256
SIGMA = 96.0
STRENGTHS = {"key_strength": 0.5, "value_strength": 1.0}


def cases(device: torch.device) -> list[KernelCase]:
    """Return 15% of 32K rows, cached ones behind each other and where they lie in a pool; on a CPU a small case."""
    return [_case(device, is_pooled=is_pooled) for is_pooled in (False, True)]


def _case(device: torch.device, *, is_pooled: bool) -> KernelCase:
    rows, shape = 32768 if device.type == "cuda" else 2 * CHUNK, model_shape(device)
    selected = torch.randperm(rows, device=device)[: int(rows * 0.15)].sort().values
    starts = torch.arange(0, rows + 1, CHUNK, device=device)
    change = plan_propagation(selected, starts, torch.searchsorted(selected, starts), SIGMA)
    plan = FieldPlan(change, ChunkCells(change.cu_rows, BLOCK_SIZE, device))
    inputs = [kv_rows(rows if is_pooled and part < 2 else len(selected), shape, device) for part in range(4)]
    places = torch.randperm(rows, device=device)[: len(selected)] if is_pooled else None
    size = (rows // BLOCK_SIZE, BLOCK_SIZE // FIELD_ROWS, shape.kv_heads, shape.head_dim)
    fields = [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(2)]

    def run() -> None:
        change_field(*inputs, plan, *fields, **STRENGTHS, places=places, backend=Backend.TRITON)

    def check() -> None:
        run()
        expected = [field.float() for field in fields]
        change_field_torch(*(part.float() for part in inputs), plan, *expected, **STRENGTHS, places=places)
        for mine, reference in zip(fields, expected, strict=True):
            assert_matches(mine, reference, reduced=2)

    return KernelCase(
        name="change_field, pooled rows" if is_pooled else "change_field",
        shape=f"{len(selected):,} of {rows:,} rows recomputed, chunks of {CHUNK}, {shape.heads}",
        run=run,
        check=check,
        work=4.0 * shape.kv_bytes * len(selected) + 2.0 * shape.kv_bytes * rows / FIELD_ROWS,
        kind="bandwidth",
    )
