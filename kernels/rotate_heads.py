# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Heads turned to positions, in one launch.

    out = R(position) x,   R = half-split rotation

Source: RoFormer, arXiv 2104.09864, section 3.4.2. Cost: reads and writes every element once; bandwidth bound. The
definition goes head after head, which is what suits a CPU; on a GPU that were seven launches a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.rotation import rotate_into


def rotate_heads(
    heads: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, backend: Backend | None = None
) -> Tensor:
    """Return (tokens, heads, head_dim), contiguous, in the dtype of `heads`, computed in fp32.

    Args:
        heads: (tokens, heads, head_dim); heads of a token that do not lie behind each other are copied first.
        cos, sin: (rows, head_dim / 2) fp32, contiguous.
        positions: (tokens,) int64, below the rows of `cos`; without it row i is that of token i.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(heads, cos, sin, positions)
    if resolve_backend(heads, backend) is Backend.TORCH:
        return rotate_heads_torch(heads, cos, sin, positions)
    tokens, num_heads, head_dim = heads.shape
    if heads.numel() and heads.stride()[1:] != (head_dim, 1):
        heads = heads.contiguous()
    out = torch.empty((tokens, num_heads, head_dim), dtype=heads.dtype, device=heads.device)
    if out.numel():
        _rotate_heads_kernel[(tokens,)](
            heads, out, cos, sin, cos if positions is None else positions, heads.stride(0),
            HEADS=num_heads, HEADS_PADDED=next_power_of_2(num_heads), HALF=head_dim // 2,
            HALF_PADDED=next_power_of_2(head_dim // 2), IN_ORDER=positions is None,
        )  # fmt: skip
    return out


def rotate_heads_torch(heads: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return what `rotate_heads` returns: the definition."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    rotate_into(out, heads, cos, sin)
    return out


def _check_inputs(heads: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if heads.dim() != 3 or heads.shape[2] % 2:
        raise KernelInputError(f"heads must be (tokens, heads, an even head_dim), got {tuple(heads.shape)}")
    rows = (len(cos) if positions is not None else len(heads), heads.shape[2] // 2)
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) != rows or not table.is_contiguous():
            raise KernelInputError(f"{name} must be {rows} and contiguous, got {tuple(table.shape)}")
    if positions is not None and positions.shape != heads.shape[:1]:
        raise KernelInputError(f"positions must be ({len(heads)},), got {tuple(positions.shape)}")


@launched
def _rotate_heads_kernel(
    head_ptr, out_ptr, cos_ptr, sin_ptr, position_ptr, stride_t,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    IN_ORDER: tl.constexpr,
):  # fmt: skip
    # This program turns all heads of one token, as two halves of (heads, HALF) each.
    token = tl.program_id(0).to(tl.int64)
    row = token
    if not IN_ORDER:
        row = tl.load(position_ptr + token)
    column = tl.arange(0, HALF_PADDED)
    cos = tl.load(cos_ptr + row * HALF + column, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + row * HALF + column, mask=column < HALF, other=0.0)[None, :]
    head = tl.arange(0, HEADS_PADDED)[:, None]
    inside = (head < HEADS) & (column < HALF)[None, :]
    at = head * (2 * HALF) + column[None, :]
    first = tl.load(head_ptr + token * stride_t + at, mask=inside)
    second = tl.load(head_ptr + token * stride_t + at + HALF, mask=inside)
    target = out_ptr + token * (HEADS * 2 * HALF) + at
    turned = first.to(tl.float32) * cos - second.to(tl.float32) * sin
    tl.store(target, turned.to(first.dtype), mask=inside)
    turned = second.to(tl.float32) * cos + first.to(tl.float32) * sin
    tl.store(target + HALF, turned.to(first.dtype), mask=inside)
