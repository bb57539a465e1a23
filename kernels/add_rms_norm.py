# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Add a residual and normalise, in one pass.

    summed = hidden + residual,   normed = summed / sqrt(mean(summed^2) + eps) * weight

Source: RMSNorm, arXiv 1910.07467, equation 4; the mean is taken in fp32, as Llama checkpoints expect.
Cost: reads two and writes two rows of `hidden_size` a token; bandwidth bound.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Return `(normed, summed)`, both (tokens, hidden_size) in the dtype of `hidden`.

    Args:
        hidden: (tokens, hidden_size), last dimension contiguous.
        residual: like `hidden`, or None for zeros; `summed` is then `hidden` itself.
        weight: (hidden_size,).
        eps: added to the mean square.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes or types do not fit.
    """
    _check_inputs(hidden, residual, weight)
    if resolve_backend(hidden, backend) is Backend.TORCH:
        return add_rms_norm_torch(hidden, residual, weight, eps)
    normed = torch.empty_like(hidden)
    summed = hidden if residual is None else torch.empty_like(hidden)
    tokens, size = hidden.shape
    if tokens:
        block = next_power_of_2(size)
        _add_rms_norm_kernel[(tokens,)](
            hidden, hidden if residual is None else residual, weight, normed, summed,
            size, eps,
            hidden.stride(0), 0 if residual is None else residual.stride(0), normed.stride(0),
            HAS_RESIDUAL=residual is not None, BLOCK=block,
            num_warps=8 if block >= 4096 else 4,
        )  # fmt: skip
    return normed, summed


def add_rms_norm_torch(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what `add_rms_norm` returns: the definition."""
    summed = hidden if residual is None else hidden + residual
    normed = functional.rms_norm(summed.float(), (summed.shape[-1],), eps=eps)
    return normed.to(hidden.dtype) * weight, summed


def _check_inputs(hidden: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    if hidden.dim() != 2 or (hidden.numel() and hidden.stride(-1) != 1):
        raise KernelInputError(f"hidden must be (tokens, hidden_size) with contiguous rows, got {tuple(hidden.shape)}")
    if weight.shape != hidden.shape[1:] or not weight.is_contiguous():
        raise KernelInputError(f"weight must be ({hidden.shape[1]},), got {tuple(weight.shape)}")
    if residual is not None and (
        residual.shape != hidden.shape
        or residual.dtype != hidden.dtype
        or (residual.numel() and residual.stride(-1) != 1)
    ):
        raise KernelInputError(
            f"residual must be like hidden {tuple(hidden.shape)} {hidden.dtype} with contiguous rows, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )


@launched
def _add_rms_norm_kernel(
    hidden_ptr, residual_ptr, weight_ptr, normed_ptr, summed_ptr,
    size, eps,
    stride_ht, stride_rt, stride_nt,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # This program normalises one token; `summed` has the strides of `normed`.
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    row = tl.load(hidden_ptr + token * stride_ht + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * stride_rt + column, mask=inside, other=0.0)
        # Rounded to the storage type before the norm sees it, as if the two steps ran apart.
        row = (row.to(tl.float32) + residual.to(tl.float32)).to(row.dtype)
        tl.store(summed_ptr + token * stride_nt + column, row, mask=inside)
    value = row.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / size + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    normed = (value * scale).to(row.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(normed_ptr + token * stride_nt + column, normed.to(row.dtype), mask=inside)
