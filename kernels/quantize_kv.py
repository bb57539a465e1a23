# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Round keys or values to 8 or 4 bits with a scale and a zero for each small group of numbers.

    zero = lower16(min),  scale = upper16((max - zero) / (2^bits - 1)),  code = round((x - zero) / scale)

over groups of `token_group` tokens by `channel_group` channels of one head: keys before RoPE have outlier channels and
are grouped along the tokens, values along the channels. lower16 and upper16 round to fp16 downwards and upwards, so
that the group's extremes stay within the codes and the error is at most half a scale.
Source: KIVI, arXiv 2402.02750, section 3; keys before RoPE: KVQuant, arXiv 2401.18079, section 3.2.
Cost: reads every element once; bandwidth bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched

_TILE = 2048  # elements that one program holds of one half of a head


class QuantizedHeads(NamedTuple):
    """Keys or values of several tokens as codes.

    Attributes:
        codes: uint8, (tokens, heads, head_dim) of 8 bits, or (tokens, heads, head_dim / 2) of 4 bits: channel d in the
            low half of a byte and channel d + head_dim / 2 in the high half, so one byte holds what RoPE pairs.
        scale, zero: (ceil(tokens / token_group), heads, head_dim / channel_group) fp16.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize_kv(
    heads: Tensor,
    *,
    bits: int,
    token_group: int,
    channel_group: int,
    out: QuantizedHeads | None = None,
    slots: Tensor | None = None,
    backend: Backend | None = None,
) -> QuantizedHeads:
    """Return `heads` (tokens, heads, head_dim) as codes; values must be finite and below fp16's largest.

    Args:
        heads: keys before RoPE, or values; heads of a token contiguous, tokens at any stride.
        bits: 8 or 4.
        token_group: tokens that share a scale, a power of two.
        channel_group: channels that share a scale, a power of two that divides head_dim / 2.
        out: where to write, instead of new tensors; contiguous, a whole number of groups of tokens.
        slots: (ceil(tokens / token_group),) int64, distinct: group i of the tokens goes to group `slots[i]` of `out`.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes or groups do not fit.
    """
    check_groups(heads.shape, bits, token_group, channel_group)
    if heads.numel() and heads.stride()[1:] != (heads.shape[2], 1):
        raise KernelInputError(f"the heads of one token must be contiguous, got strides {heads.stride()}")
    if (out is None) != (slots is None):
        raise KernelInputError("out and slots are given together or not at all")
    if out is not None and slots is not None:
        _check_target(heads.shape, bits, token_group, channel_group, out, slots)
    if resolve_backend(heads, backend) is Backend.TORCH:
        return quantize_kv_torch(
            heads, bits=bits, token_group=token_group, channel_group=channel_group, out=out, slots=slots
        )
    tokens, num_heads, head_dim = heads.shape
    out = out or empty_codes(heads.shape, bits, token_group, channel_group, heads.device)
    if heads.numel() == 0:
        return out
    groups, half = head_dim // 2 // channel_group, head_dim // 2
    group_elements = token_group * next_power_of_2(groups) * channel_group
    row_groups = max(1, min(_TILE // group_elements, next_power_of_2(ceil_div(tokens, token_group))))
    _quantize_kv_kernel[(ceil_div(tokens, token_group * row_groups), num_heads)](
        heads, out.codes, out.scale, out.zero, heads if slots is None else slots, tokens, heads.stride(0), num_heads,
        HALF=half, GROUPS=groups, GROUPS_PADDED=next_power_of_2(groups), CHANNEL_GROUP=channel_group,
        TOKEN_GROUP=token_group, ROW_GROUPS=row_groups, FOUR_BITS=bits == 4, HAS_SLOTS=slots is not None,
    )  # fmt: skip
    return out


def quantize_kv_torch(
    heads: Tensor,
    *,
    bits: int,
    token_group: int,
    channel_group: int,
    out: QuantizedHeads | None = None,
    slots: Tensor | None = None,
) -> QuantizedHeads:
    """Return what `quantize_kv` returns: the definition."""
    tokens, num_heads, head_dim = heads.shape
    if heads.numel() == 0:
        return out or empty_codes(heads.shape, bits, token_group, channel_group, heads.device)
    missing = -tokens % token_group
    padded = functional.pad(heads.float().flatten(1).T, (0, missing), mode="replicate").T
    grouped = padded.reshape(-1, token_group, num_heads, head_dim // channel_group, channel_group)
    low, high = grouped.amin((1, 4)), grouped.amax((1, 4))
    zero = (low - low.abs() * 2**-10 - 2**-24).half()
    scale = ((high - zero.float()) / (2**bits - 1) * (1 + 2**-10) + 2**-24).half()
    steps = (grouped - zero.float()[:, None, :, :, None]) / scale.float()[:, None, :, :, None]
    codes = (steps + 0.5).floor().clamp(0, 2**bits - 1).to(torch.uint8)
    codes = codes.reshape(-1, num_heads, head_dim)[:tokens]
    if bits == 4:
        first, second = codes.chunk(2, dim=-1)
        codes = first | (second << 4)
    if out is None or slots is None:
        return QuantizedHeads(codes.contiguous(), scale, zero)
    rows = (slots.unsqueeze(1) * token_group + torch.arange(token_group, device=slots.device)).flatten()[:tokens]
    out.codes[rows], out.scale[slots], out.zero[slots] = codes, scale, zero
    return out


def empty_codes(
    shape: tuple[int, ...], bits: int, token_group: int, channel_group: int, device: torch.device
) -> QuantizedHeads:
    """Return unwritten codes for keys or values of `shape` (tokens, heads, head_dim)."""
    tokens, num_heads, head_dim = shape
    codes = torch.empty((tokens, num_heads, head_dim * bits // 8), dtype=torch.uint8, device=device)
    sizes = (ceil_div(tokens, token_group), num_heads, head_dim // channel_group)
    scale, zero = (torch.empty(sizes, dtype=torch.float16, device=device) for _ in range(2))
    return QuantizedHeads(codes, scale, zero)


def check_groups(shape: tuple[int, ...], bits: int, token_group: int, channel_group: int) -> None:
    """Raise `KernelInputError` unless heads of `shape` can be grouped like this."""
    if len(shape) != 3 or shape[2] % 2:
        raise KernelInputError(f"keys or values must be (tokens, heads, an even head_dim), got {tuple(shape)}")
    if bits not in (4, 8):
        raise KernelInputError(f"codes have 4 or 8 bits, got {bits}")
    for name, group in (("token_group", token_group), ("channel_group", channel_group)):
        if group < 1 or group & (group - 1):
            raise KernelInputError(f"{name} must be a power of two, got {group}")
    if (shape[2] // 2) % channel_group:
        raise KernelInputError(f"channel_group must divide half of the head_dim {shape[2]}, got {channel_group}")


def _check_target(
    shape: tuple[int, ...], bits: int, token_group: int, channel_group: int, out: QuantizedHeads, slots: Tensor
) -> None:
    tokens, num_heads, head_dim = shape
    rows = len(out.codes)
    expected = (
        (rows, num_heads, head_dim * bits // 8),
        *((rows // token_group, num_heads, head_dim // channel_group),) * 2,
    )
    if tuple(tuple(part.shape) for part in out) != expected or rows % token_group:
        raise KernelInputError(f"out must be of {expected}, got {[tuple(part.shape) for part in out]}")
    if not all(part.is_contiguous() for part in out):
        raise KernelInputError("out must be contiguous")
    if slots.shape != (ceil_div(tokens, token_group),) or slots.dtype != torch.int64:
        raise KernelInputError(
            f"slots must be ({ceil_div(tokens, token_group)},) int64, got {tuple(slots.shape)} {slots.dtype}"
        )


@jit
def _quantized(x_ptr, scale_ptr, zero_ptr, token, target, group, channel, seen, stored, stride_t,
               num_heads, GROUP_BASE: tl.constexpr, CHANNEL_BASE: tl.constexpr, ALL_GROUPS: tl.constexpr,
               HEAD_DIM: tl.constexpr, LARGEST: tl.constexpr):  # fmt: skip
    # Codes (ROW_GROUPS, TOKEN_GROUP, GROUPS_PADDED, CHANNEL_GROUP) of one half of one head; writes scale and zero.
    head = tl.program_id(1)
    x = tl.load(x_ptr + token * stride_t + head * HEAD_DIM + CHANNEL_BASE + channel, mask=seen, other=0.0)
    x = x.to(tl.float32)
    low = tl.min(tl.min(tl.where(seen, x, float("inf")), axis=3), axis=1)
    high = tl.max(tl.max(tl.where(seen, x, float("-inf")), axis=3), axis=1)
    low, high = tl.where(stored, low, 0.0), tl.where(stored, high, 0.0)
    zero = (low - tl.abs(low) * 0.0009765625 - 5.9604644775390625e-08).to(tl.float16)
    span = high - zero.to(tl.float32)
    scale = (span / LARGEST * 1.0009765625 + 5.9604644775390625e-08).to(tl.float16)
    at = (target[:, None] * num_heads + head) * ALL_GROUPS + GROUP_BASE + group
    tl.store(scale_ptr + at, scale, mask=stored)
    tl.store(zero_ptr + at, zero, mask=stored)
    steps = (x - zero.to(tl.float32)[:, None, :, None]) / scale.to(tl.float32)[:, None, :, None]
    return tl.minimum(tl.maximum(tl.floor(steps + 0.5), 0.0), LARGEST).to(tl.uint8)


@launched(do_not_specialize=("tokens",))  # no request waits for another compilation
def _quantize_kv_kernel(
    x_ptr, code_ptr, scale_ptr, zero_ptr, slot_ptr, tokens, stride_t, num_heads,
    HALF: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, CHANNEL_GROUP: tl.constexpr,
    TOKEN_GROUP: tl.constexpr, ROW_GROUPS: tl.constexpr, FOUR_BITS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    # This program treats ROW_GROUPS groups of tokens of one head, as two halves of HALF channels each.
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROW_GROUPS + tl.arange(0, ROW_GROUPS)
    groups = tl.arange(0, GROUPS_PADDED)
    token = rows[:, None, None, None] * TOKEN_GROUP + tl.arange(0, TOKEN_GROUP)[None, :, None, None]
    channel = groups[None, None, :, None] * CHANNEL_GROUP + tl.arange(0, CHANNEL_GROUP)[None, None, None, :]
    seen = (token < tokens) & (groups < GROUPS)[None, None, :, None] & (channel < HALF)
    group = groups[None, :]
    stored = (rows[:, None] * TOKEN_GROUP < tokens) & (group < GROUPS)
    target = rows
    if HAS_SLOTS:
        target = tl.load(slot_ptr + rows, mask=rows * TOKEN_GROUP < tokens, other=0)
    LARGEST: tl.constexpr = 15.0 if FOUR_BITS else 255.0
    first = _quantized(
        x_ptr, scale_ptr, zero_ptr, token, target, group, channel, seen, stored, stride_t,
        num_heads, 0, 0, 2 * GROUPS, 2 * HALF, LARGEST,
    )  # fmt: skip
    second = _quantized(
        x_ptr, scale_ptr, zero_ptr, token, target, group, channel, seen, stored, stride_t,
        num_heads, GROUPS, HALF, 2 * GROUPS, 2 * HALF, LARGEST,
    )  # fmt: skip
    row = target[:, None, None, None] * TOKEN_GROUP + tl.arange(0, TOKEN_GROUP)[None, :, None, None]
    if FOUR_BITS:
        tl.store(code_ptr + (row * num_heads + head) * HALF + channel, first | (second << 4), mask=seen)
    else:
        at = (row * num_heads + head) * (2 * HALF) + channel
        tl.store(code_ptr + at, first, mask=seen)
        tl.store(code_ptr + at + HALF, second, mask=seen)
