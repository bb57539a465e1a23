"""The gate of the feed-forward layer at the shape of Llama 3 8B."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, model_shape, normal

from ragkit.kernels.backend import Backend
from ragkit.kernels.silu_mul import silu_mul, silu_mul_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return 16K tokens, and 15% of 32K; on a CPU a small case."""
    return [_case(tokens, device) for tokens in ((16384, 4915) if device.type == "cuda" else (20,))]


def _case(tokens: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    gate_up = normal(tokens, 2 * shape.intermediate_size, shape=shape, device=device)

    return KernelCase(
        name="silu_mul",
        shape=f"{tokens:,} x {shape.intermediate_size:,}",
        run=lambda: silu_mul(gate_up, backend=Backend.TRITON),
        check=lambda: assert_matches(silu_mul(gate_up, backend=Backend.TRITON), silu_mul_torch(gate_up.float())),
        work=gate_up.nbytes * 1.5,
        kind="bandwidth",
        baseline_name="torch.compile",
        baseline=compiled(lambda: silu_mul_torch(gate_up), device),
    )
