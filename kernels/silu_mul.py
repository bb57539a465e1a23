# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""The gate of a SwiGLU feed-forward layer, on the fused projection.

    out = silu(gate) * up,   silu(x) = x / (1 + exp(-x)),   gate_up = [gate | up]

Source: GLU variants, arXiv 2002.05202, equation 6. Cost: reads 2 and writes 1 element a result; bandwidth bound.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched


def silu_mul(gate_up: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Return (tokens, size) in the dtype of `gate_up`, computed in fp32 on Triton.

    Args:
        gate_up: (tokens, 2 * size), last dimension contiguous: the gate's columns first.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: the shape does not fit.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or (gate_up.numel() and gate_up.stride(-1) != 1):
        raise KernelInputError(f"gate_up must be (tokens, 2 * size) with contiguous rows, got {tuple(gate_up.shape)}")
    if resolve_backend(gate_up, backend) is Backend.TORCH:
        return silu_mul_torch(gate_up)
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(1024, next_power_of_2(size))
        _silu_mul_kernel[(tokens, ceil_div(size, block))](
            gate_up, out, size, gate_up.stride(0), out.stride(0), BLOCK=block
        )
    return out


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """Return what `silu_mul` returns: the definition."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


@launched
def _silu_mul_kernel(gate_up_ptr, out_ptr, size, stride_gt, stride_ot, BLOCK: tl.constexpr):
    # This program computes BLOCK columns of one token.
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up_ptr + token * stride_gt + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * stride_gt + size + column, mask=inside, other=0.0)
    out = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out_ptr + token * stride_ot + column, out.to(up.dtype), mask=inside)
