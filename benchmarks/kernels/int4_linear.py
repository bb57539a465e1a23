"""Products with weights of 4 bits at the shapes of Llama 3 8B."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from torch import Tensor
from torch.nn.functional import linear

from ragkit.kernels.backend import Backend
from ragkit.kernels.int4_linear import int4_linear, int4_linear_torch, quantize_int4
from ragkit.kernels.testing import assert_matches

SHAPES = {"output": (4096, 4096), "qkv": (6144, 4096), "gate and up": (28672, 4096), "down": (4096, 14336)}


def cases(device: torch.device) -> list[KernelCase]:
    """Return the products of a layer and of the vocabulary for 1 to 16 rows; on a CPU small ones."""
    if device.type != "cuda":
        return [_case("small", (96, 256), tokens, device) for tokens in (1, 2, 5)]
    cases = [_case(name, size, tokens, device) for name, size in SHAPES.items() for tokens in (1, 2, 16)]
    return [*cases, *(_case("vocabulary", (128256, 4096), tokens, device) for tokens in (1, 2, 16))]


def _case(name: str, size: tuple[int, int], tokens: int, device: torch.device) -> KernelCase:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = torch.randn(size, device=device).to(dtype)
    weight = quantize_int4(plain, 32)
    rows = torch.randn(tokens, size[1], device=device).to(dtype)

    def run() -> Tensor:
        return int4_linear(rows, weight, backend=Backend.TRITON)

    def check() -> None:
        assert_matches(run(), int4_linear_torch(rows.float(), weight), reduced=4)

    return KernelCase(
        name="int4_linear",
        shape=f"{tokens} rows, {name}: {size[0]:,} x {size[1]:,}",
        run=run,
        check=check,
        work=weight.nbytes + rows.nbytes + tokens * size[0] * dtype.itemsize,
        kind="bandwidth",
        baseline_name="torch linear with the weights in 16 bits",
        baseline=lambda: linear(rows, plain),
    )
