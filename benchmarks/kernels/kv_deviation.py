"""Deviation of recomputed from cached KV at the shape of Llama 3 8B."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, kv_rows, model_shape

from ragkit.kernels.backend import Backend
from ragkit.kernels.kv_deviation import kv_deviation, kv_deviation_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return all rows of a prompt of 32K, and 15% of them; on a CPU a small case."""
    return [_case(tokens, device) for tokens in ((32768, 4915) if device.type == "cuda" else (40,))]


def _case(tokens: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    inputs = [kv_rows(tokens, shape, device) for _ in range(4)]

    def run() -> object:
        return kv_deviation(*inputs, backend=Backend.TRITON)

    def check() -> None:
        expected = kv_deviation_torch(*(part.float() for part in inputs))
        for mine, reference in zip(kv_deviation(*inputs, backend=Backend.TRITON), expected, strict=True):
            assert_matches(mine, reference)

    return KernelCase(
        name="kv_deviation",
        shape=f"{tokens:,} tokens, {shape.kv_heads} heads of {shape.head_dim}",
        run=run,
        check=check,
        work=tokens * (4 * shape.kv_bytes + 8),
        kind="bandwidth",
        baseline_name="torch.compile",
        baseline=compiled(lambda: kv_deviation_torch(*inputs), device),
    )
