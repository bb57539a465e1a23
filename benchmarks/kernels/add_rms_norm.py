"""Residual and RMSNorm at the shape of Llama 3 8B."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, model_shape, normal

from ragkit.kernels.add_rms_norm import add_rms_norm, add_rms_norm_torch
from ragkit.kernels.backend import Backend
from ragkit.kernels.testing import assert_matches

EPS = 1e-5


def cases(device: torch.device) -> list[KernelCase]:
    """Return a prefill of 32K tokens, and 15% of it; on a CPU a small case."""
    return [_case(tokens, device) for tokens in ((32768, 4915) if device.type == "cuda" else (20,))]


def _case(tokens: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    hidden, residual = (normal(tokens, shape.hidden_size, shape=shape, device=device) for _ in range(2))
    weight = normal(shape.hidden_size, shape=shape, device=device)

    def check() -> None:
        got = add_rms_norm(hidden, residual, weight, EPS, backend=Backend.TRITON)
        expected = add_rms_norm_torch(hidden.float(), residual.float(), weight.float(), EPS)
        for mine, reference in zip(got, expected, strict=True):
            assert_matches(mine, reference)

    return KernelCase(
        name="add_rms_norm",
        shape=f"{tokens:,} x {shape.hidden_size:,}",
        run=lambda: add_rms_norm(hidden, residual, weight, EPS, backend=Backend.TRITON),
        check=check,
        work=4 * hidden.nbytes,
        kind="bandwidth",
        baseline_name="torch.compile",
        baseline=compiled(lambda: add_rms_norm_torch(hidden, residual, weight, EPS), device),
    )
