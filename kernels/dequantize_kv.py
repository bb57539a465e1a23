# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Turn 8- or 4-bit codes back into keys or values, straight into the rows of a pool where asked.

    x = code * scale + zero     (see quantize_kv for the groups)

Source: KIVI, arXiv 2402.02750, section 3.
Cost: reads the codes and writes the numbers once; bandwidth bound.
"""

from __future__ import annotations

from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.quantize_kv import QuantizedHeads

_TILE = 2048  # elements that one program holds of one half of a head


def dequantize_kv(
    quantized: QuantizedHeads,
    out: Tensor,
    slots: Tensor | None = None,
    *,
    token_group: int,
    backend: Backend | None = None,
) -> None:
    """Write the numbers of `quantized` into `out`, row i or row `slots[i]`.

    Args:
        quantized: codes, scales and zeros of (tokens, heads, head_dim).
        out: (rows, heads, head_dim), contiguous, of any float type.
        slots: (tokens,) int64, distinct rows of `out`; without it `out` has exactly the tokens' rows.
        token_group: tokens that share a scale.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    bits = _check_inputs(quantized, out, slots, token_group)
    if resolve_backend(out, backend) is Backend.TORCH:
        dequantize_kv_torch(quantized, out, slots, token_group=token_group)
        return
    tokens, num_heads, _ = quantized.codes.shape
    half = out.shape[2] // 2
    if quantized.codes.numel() == 0:
        return
    block = max(1, min(_TILE // next_power_of_2(half), next_power_of_2(tokens)))
    _dequantize_kv_kernel[(ceil_div(tokens, block), num_heads)](
        quantized.codes, quantized.scale, quantized.zero, out, out if slots is None else slots, tokens, num_heads,
        TOKEN_GROUP=token_group, CHANNEL_GROUP=out.shape[2] // quantized.scale.shape[2],
        HALF=half, HALF_PADDED=next_power_of_2(half), TOKENS=block,
        FOUR_BITS=bits == 4, HAS_SLOTS=slots is not None,
    )  # fmt: skip


def dequantize_kv_torch(
    quantized: QuantizedHeads, out: Tensor, slots: Tensor | None = None, *, token_group: int
) -> None:
    """Do what `dequantize_kv` does: the definition."""
    codes, scale, zero = quantized
    tokens, _, head_dim = len(codes), codes.shape[1], out.shape[2]
    if codes.shape[2] != head_dim:
        packed = codes
        codes = codes.new_empty((*codes.shape[:2], head_dim))
        codes[..., : head_dim // 2], codes[..., head_dim // 2 :] = packed & 15, packed >> 4
    channel_group = head_dim // scale.shape[2]
    scale, zero = (
        part.float().repeat_interleave(token_group, 0)[:tokens].repeat_interleave(channel_group, 2)
        for part in (scale, zero)
    )
    numbers = codes.float() * scale + zero
    if slots is None:
        out.copy_(numbers)
    else:
        out[slots] = numbers.to(out.dtype)


def _check_inputs(quantized: QuantizedHeads, out: Tensor, slots: Tensor | None, token_group: int) -> int:
    codes, scale, zero = quantized
    if out.dim() != 3 or not out.is_contiguous():
        raise KernelInputError(f"out must be contiguous (rows, heads, head_dim), got {tuple(out.shape)}")
    tokens, num_heads, head_dim = len(codes), out.shape[1], out.shape[2]
    bits = {head_dim: 8, head_dim // 2: 4}.get(codes.shape[-1])
    if codes.dim() != 3 or codes.shape[1] != num_heads or bits is None:
        raise KernelInputError(f"codes {tuple(codes.shape)} do not fit rows {tuple(out.shape)}")
    fits = scale.shape == zero.shape and scale.shape[:2] == (ceil_div(tokens, token_group), num_heads)
    if not fits or (scale.numel() and (head_dim // 2) % (head_dim // scale.shape[2])):
        raise KernelInputError(f"scales {tuple(scale.shape)} do not fit {tokens} tokens in groups of {token_group}")
    if not all(part.is_contiguous() for part in quantized):
        raise KernelInputError("codes, scales and zeros must be contiguous")
    if slots is None and len(out) != tokens:
        raise KernelInputError(f"out has {len(out)} rows for {tokens} tokens: give their slots")
    if slots is not None and slots.shape != (tokens,):
        raise KernelInputError(f"slots must be ({tokens},), got {tuple(slots.shape)}")
    return bits


@jit
def _spread(of_group, CHANNEL_GROUP: tl.constexpr):
    # The number of each group, fp32, for each of its channels.
    of_group = of_group.to(tl.float32)
    if CHANNEL_GROUP == 1:
        return of_group
    wide = of_group[:, :, None].broadcast_to(of_group.shape[0], of_group.shape[1], CHANNEL_GROUP)
    return wide.reshape(of_group.shape[0], of_group.shape[1] * CHANNEL_GROUP)


@launched
def _dequantize_kv_kernel(
    code_ptr, scale_ptr, zero_ptr, out_ptr, slot_ptr, tokens, num_heads,
    TOKEN_GROUP: tl.constexpr, CHANNEL_GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, FOUR_BITS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    # This program treats TOKENS tokens of one head, as two halves of HALF channels each.
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, HALF_PADDED)
    in_tokens = token < tokens
    mask = in_tokens[:, None] & (channel < HALF)[None, :]
    if HAS_SLOTS:  # noqa: SIM108 (both branches must not be compiled)
        row = tl.load(slot_ptr + token, mask=in_tokens, other=0)
    else:
        row = token
    GROUPS: tl.constexpr = HALF // CHANNEL_GROUP
    base = (token[:, None] * num_heads + head) * HALF
    if FOUR_BITS:
        packed = tl.load(code_ptr + base + channel[None, :], mask=mask, other=0)
        first, second = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
    else:
        first = tl.load(code_ptr + 2 * base + channel[None, :], mask=mask, other=0).to(tl.float32)
        second = tl.load(code_ptr + 2 * base + HALF + channel[None, :], mask=mask, other=0).to(tl.float32)
    group = tl.arange(0, HALF_PADDED // CHANNEL_GROUP)
    at = ((token // TOKEN_GROUP)[:, None] * num_heads + head) * (2 * GROUPS) + group[None, :]
    known = in_tokens[:, None] & (group < GROUPS)[None, :]
    target = out_ptr + (row[:, None] * num_heads + head) * (2 * HALF) + channel[None, :]
    scale = _spread(tl.load(scale_ptr + at, mask=known, other=0.0), CHANNEL_GROUP)
    zero = _spread(tl.load(zero_ptr + at, mask=known, other=0.0), CHANNEL_GROUP)
    tl.store(target, (first * scale + zero).to(out_ptr.dtype.element_ty), mask=mask)
    scale = _spread(tl.load(scale_ptr + at + GROUPS, mask=known, other=0.0), CHANNEL_GROUP)
    zero = _spread(tl.load(zero_ptr + at + GROUPS, mask=known, other=0.0), CHANNEL_GROUP)
    tl.store(target + HALF, (second * scale + zero).to(out_ptr.dtype.element_ty), mask=mask)
