# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""How far the recomputed keys and values of each token lie from its cached ones.

    key_t = sum_hd (fresh_key_thd - cached_key_thd)^2,   value_t likewise

Source: CacheBlend, arXiv 2405.16444, section 4.3, which chooses tokens by it, of values; LMCache's code takes keys.
Keys are compared before rotation, which turns both alike and so leaves the distance as it is.
Cost: reads every element once; bandwidth bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched

_TILE = 4096  # elements that one program holds of one tensor
_COLUMNS = 1024  # of these, at most so many of one token


def kv_deviation(
    fresh_keys: Tensor,
    fresh_values: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(of_keys, of_values)`, both (tokens,) fp32: squared distances over heads and channels.

    Args:
        fresh_keys, fresh_values, cached_keys, cached_values: (tokens, kv_heads, head_dim), keys un-rotated; heads of a
            token contiguous, tokens at any stride.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(fresh_keys, fresh_values, cached_keys, cached_values)
    if resolve_backend(fresh_keys, backend) is Backend.TORCH:
        return kv_deviation_torch(fresh_keys, fresh_values, cached_keys, cached_values)
    tokens, channels = len(fresh_keys), fresh_keys[0].numel() if len(fresh_keys) else 0
    of_keys, of_values = torch.empty((2, tokens), dtype=torch.float32, device=fresh_keys.device).unbind()
    if tokens == 0:
        return of_keys, of_values
    columns = min(_COLUMNS, next_power_of_2(channels))
    rows = min(_TILE // columns, next_power_of_2(tokens))
    _kv_deviation_kernel[(ceil_div(tokens, rows), 2)](
        fresh_keys, fresh_values, cached_keys, cached_values, of_keys, of_values, tokens,
        fresh_keys.stride(0), fresh_values.stride(0), cached_keys.stride(0), cached_values.stride(0),
        CHANNELS=channels, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return of_keys, of_values


def kv_deviation_torch(
    fresh_keys: Tensor, fresh_values: Tensor, cached_keys: Tensor, cached_values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `kv_deviation` returns: the definition."""
    of_keys, of_values = (
        (fresh.float() - cached.float()).flatten(1).square_().sum(dim=1)
        for fresh, cached in ((fresh_keys, cached_keys), (fresh_values, cached_values))
    )
    return of_keys, of_values


def _check_inputs(fresh_keys: Tensor, fresh_values: Tensor, cached_keys: Tensor, cached_values: Tensor) -> None:
    shape = fresh_keys.shape
    if fresh_keys.dim() != 3:
        raise KernelInputError(f"fresh_keys must be (tokens, kv_heads, head_dim), got {tuple(shape)}")
    for name, heads in (
        ("fresh_keys", fresh_keys),
        ("fresh_values", fresh_values),
        ("cached_keys", cached_keys),
        ("cached_values", cached_values),
    ):
        if heads.shape != shape:
            raise KernelInputError(f"{name} must be {tuple(shape)} like fresh_keys, got {tuple(heads.shape)}")
        if heads.numel() and heads.stride()[1:] != (shape[2], 1):
            raise KernelInputError(f"the heads of one token of {name} must be contiguous, got strides {heads.stride()}")


@jit
def _squared_distances(
    fresh_ptr, cached_ptr, out_ptr, tokens, stride_ft, stride_ct,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, CHANNELS, COLUMNS):
        channel = start + column
        mask = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
        fresh = tl.load(fresh_ptr + token[:, None] * stride_ft + channel[None, :], mask=mask, other=0.0)
        cached = tl.load(cached_ptr + token[:, None] * stride_ct + channel[None, :], mask=mask, other=0.0)
        change = fresh.to(tl.float32) - cached.to(tl.float32)
        total += tl.sum(change * change, axis=1)
    tl.store(out_ptr + token, total, mask=token < tokens)


@launched(do_not_specialize=("tokens",))  # no request waits for another compilation
def _kv_deviation_kernel(
    fresh_key_ptr, fresh_value_ptr, cached_key_ptr, cached_value_ptr, of_keys_ptr, of_values_ptr, tokens,
    stride_fk, stride_fv, stride_ck, stride_cv,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # This program compares the keys or the values of ROWS tokens.
    if tl.program_id(1) == 0:
        _squared_distances(
            fresh_key_ptr, cached_key_ptr, of_keys_ptr, tokens, stride_fk, stride_ck, CHANNELS, ROWS, COLUMNS
        )
    else:
        _squared_distances(
            fresh_value_ptr, cached_value_ptr, of_values_ptr, tokens, stride_fv, stride_cv, CHANNELS, ROWS, COLUMNS
        )
