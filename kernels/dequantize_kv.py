# ruff: noqa: ANN001, ANN201, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Turn 8- or 4-bit codes back into keys or values, straight into the rows of a pool where asked.

    x = code * scale + zero     (see quantize_kv for the groups)

Source: KIVI, arXiv 2402.02750, section 3.
Cost: reads the codes and writes the numbers once; bandwidth bound. A program takes whole rows, all heads of them: the
memory opens a page for what lies side by side in it, and a head's part of each row would have every page opened anew.
"""

from __future__ import annotations

from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.quantize_kv import QuantizedHeads

_CODE_BYTES = 4096  # that one program reads, behind each other


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
    tokens, num_heads, head_bytes = quantized.codes.shape
    if quantized.codes.numel() == 0:
        return
    width, channel_group = num_heads * head_bytes, out.shape[2] // quantized.scale.shape[2]
    by_channel = channel_group == 1
    rows = rows_of_a_program(width, token_group if by_channel else tokens)
    _dequantize_kv_kernel[(ceil_div(tokens, rows),)](
        quantized.codes, quantized.scale, quantized.zero, out, out if slots is None else slots, tokens,
        HEADS=num_heads, HEAD_DIM=out.shape[2], WIDTH=width, WIDTH_PADDED=next_power_of_2(width),
        TOKEN_GROUP=token_group, CHANNEL_GROUP=channel_group,
        GROUPS_PADDED=next_power_of_2(rows * width // channel_group), ROWS=rows, BY_CHANNEL=by_channel,
        FOUR_BITS=bits == 4, HAS_SLOTS=slots is not None, num_warps=4,
    )  # fmt: skip


def rows_of_a_program(row_bytes: int, most: int) -> int:
    """Return how many rows of codes a program treats: a power of two, up to `most` or little more, of about 4 KB."""
    return min(next_power_of_2(most), max(1, _CODE_BYTES // next_power_of_2(row_bytes)))


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
def dequantize_rows(
    code_ptr, scale_ptr, zero_ptr, out_ptr, slot_ptr, first, first_row, tokens,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, ROWS: tl.constexpr,
    FOUR_BITS: tl.constexpr, HAS_SLOTS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows from token `first` on, whose channels have a scale each, which all these rows share.

    Token t goes to row `first_row + t`, or to the slot that stands there; rows of codes have WIDTH bytes.
    """
    row_of_tile = tl.arange(0, ROWS)
    token = first + row_of_tile
    is_token = token < tokens
    # A thread takes eight codes that lie side by side: it writes 16 bytes then, and the threads of a warp what follows.
    column = tl.max_contiguous(tl.arange(0, WIDTH_PADDED), 8)
    is_column = column < tl.where(first < tokens, WIDTH, 0)  # a part behind the chunk's end has no scales
    mask = is_token[:, None] & (column < WIDTH)[None, :]
    code_ptr += first.to(tl.int64) * WIDTH
    codes = tl.load(code_ptr + row_of_tile[:, None] * WIDTH + column[None, :], mask=mask, other=0)
    row = (first_row + token).to(tl.int64)
    if HAS_SLOTS:
        row = tl.load(slot_ptr + row, mask=is_token, other=0)
    channel = column
    if FOUR_BITS:  # a byte holds two channels half a head apart
        HALF: tl.constexpr = HEAD_DIM // 2
        channel = column // HALF * HEAD_DIM + column % HALF
        if HALF % 8 == 0:  # which the division hides from the compiler
            channel = tl.max_contiguous(tl.multiple_of(channel, 8), 8)
    scale = tl.load(scale_ptr + channel, mask=is_column, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + channel, mask=is_column, other=0.0).to(tl.float32)
    if FOUR_BITS:
        high_scale = tl.load(scale_ptr + channel + HALF, mask=is_column, other=0.0).to(tl.float32)
        high_zero = tl.load(zero_ptr + channel + HALF, mask=is_column, other=0.0).to(tl.float32)
        numbers = (codes >> 4).to(tl.float32) * high_scale[None, :] + high_zero[None, :]
        target = out_ptr + row[:, None] * (HEADS * HEAD_DIM) + (channel + HALF)[None, :]
        tl.store(target, numbers.to(out_ptr.dtype.element_ty), mask=mask)
        codes = codes & 15
    numbers = codes.to(tl.float32) * scale[None, :] + zero[None, :]
    target = out_ptr + row[:, None] * (HEADS * HEAD_DIM) + channel[None, :]
    tl.store(target, numbers.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def dequantize_groups(
    code_ptr, scale_ptr, zero_ptr, out_ptr, slot_ptr, first, first_row, tokens,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BYTES: tl.constexpr, TOKEN_GROUP: tl.constexpr,
    CHANNEL_GROUP: tl.constexpr, GROUPS_PADDED: tl.constexpr, ROWS: tl.constexpr, FOUR_BITS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows from token `first` on, of which CHANNEL_GROUP channels share a scale; as `dequantize_rows`."""
    # Bytes that share their scales stand behind each other, GROUPS such groups in a head.
    GROUPS: tl.constexpr = HEAD_BYTES // CHANNEL_GROUP
    group = tl.arange(0, GROUPS_PADDED)
    head, within = group // GROUPS, group % GROUPS  # heads are counted over all tokens of the tile
    token = first + head // HEADS
    is_group = (head < ROWS * HEADS) & (token < tokens)
    byte = tl.arange(0, CHANNEL_GROUP)
    if CHANNEL_GROUP > 8:
        byte = tl.max_contiguous(byte, 8)
    mask = is_group[:, None] & (byte < CHANNEL_GROUP)[None, :]
    code_ptr += first.to(tl.int64) * (HEADS * HEAD_BYTES)
    codes = tl.load(code_ptr + group[:, None] * CHANNEL_GROUP + byte[None, :], mask=mask, other=0)
    row = (first_row + token).to(tl.int64)
    if HAS_SLOTS:
        row = tl.load(slot_ptr + row, mask=is_group, other=0)
    place = row * (HEADS * HEAD_DIM) + head % HEADS * HEAD_DIM + within * CHANNEL_GROUP
    scale_at = (token // TOKEN_GROUP * HEADS + head % HEADS) * (HEAD_DIM // CHANNEL_GROUP) + within
    scale = tl.load(scale_ptr + scale_at, mask=is_group, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + scale_at, mask=is_group, other=0.0).to(tl.float32)
    if FOUR_BITS:
        high_scale = tl.load(scale_ptr + scale_at + GROUPS, mask=is_group, other=0.0).to(tl.float32)
        high_zero = tl.load(zero_ptr + scale_at + GROUPS, mask=is_group, other=0.0).to(tl.float32)
        numbers = (codes >> 4).to(tl.float32) * high_scale[:, None] + high_zero[:, None]
        target = out_ptr + (place + HEAD_DIM // 2)[:, None] + byte[None, :]
        tl.store(target, numbers.to(out_ptr.dtype.element_ty), mask=mask)
        codes = codes & 15
    numbers = codes.to(tl.float32) * scale[:, None] + zero[:, None]
    tl.store(out_ptr + place[:, None] + byte[None, :], numbers.to(out_ptr.dtype.element_ty), mask=mask)


@launched(do_not_specialize=("tokens",))
def _dequantize_kv_kernel(
    code_ptr, scale_ptr, zero_ptr, out_ptr, slot_ptr, tokens,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
    TOKEN_GROUP: tl.constexpr, CHANNEL_GROUP: tl.constexpr, GROUPS_PADDED: tl.constexpr, ROWS: tl.constexpr,
    BY_CHANNEL: tl.constexpr, FOUR_BITS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    # This program treats ROWS rows with all their heads.
    first = tl.program_id(0) * ROWS
    if BY_CHANNEL:
        at = (first // TOKEN_GROUP).to(tl.int64) * (HEADS * HEAD_DIM)
        dequantize_rows(
            code_ptr, scale_ptr + at, zero_ptr + at, out_ptr, slot_ptr, first, 0, tokens,
            HEAD_DIM, WIDTH, WIDTH_PADDED, ROWS, FOUR_BITS, HAS_SLOTS, HEADS,
        )  # fmt: skip
    else:
        dequantize_groups(
            code_ptr, scale_ptr, zero_ptr, out_ptr, slot_ptr, first, 0, tokens,
            HEADS, HEAD_DIM, WIDTH // HEADS, TOKEN_GROUP, CHANNEL_GROUP, GROUPS_PADDED, ROWS, FOUR_BITS, HAS_SLOTS,
        )  # fmt: skip
