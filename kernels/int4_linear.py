# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""A matrix product with weights of 4 bits, for the few rows of a decoding step.

    out = x w^T,   w[o, c] = code[o, c] * scale[c / group, o] + zero[c / group, o],   code in 0 .. 15

A step reads every weight once and does little with it, so a quarter of the bytes is a quarter of its floor. A code
becomes a number by its bits alone: put behind the exponent of 128 it reads as 128 + code, and what 128 times the row's
sum adds is taken off with the zero. One or two rows are multiplied lane by lane, up to 16 as one product of matrices.

Source: round to nearest with a scale and a zero a group, as in arXiv 2206.01861 (ZeroQuant), section 3, without its
distillation. Cost: reads codes, scales and zeros once; bandwidth bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched

GROUPS = (128, 64, 32)  # columns that may share a scale
SPANS = GROUPS  # columns whose codes lie in the same words; the first that divides the columns is taken
MOST_ROWS = 16  # of a product of matrices; more are multiplied as numbers
_LANE_ROWS = 2  # of a product lane by lane
_LEVELS = 15


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """Weights (out, in) as codes of 4 bits.

    Attributes:
        codes: (out, in / 8) int32; bits 4 i to 4 i + 3 of word j of a span of columns are its column i * span / 8 + j,
            so that whoever unpacks neighbouring words needs neighbouring columns.
        scales, zeros: (in / group, out) fp16; groups divide spans.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __post_init__(self) -> None:
        out, columns, groups = self.codes.shape[0], self.codes.shape[-1] * 8, self.scales.shape[0]
        if self.codes.dim() != 2 or self.codes.dtype != torch.int32 or not groups or columns % groups:
            raise KernelInputError(f"codes must be (out, in / 8) int32, got {tuple(self.codes.shape)}")
        fits = self.group in GROUPS and self.group <= self.span
        if not fits or any(part.shape != (groups, out) for part in (self.scales, self.zeros)):
            raise KernelInputError(f"scales {tuple(self.scales.shape)} do not fit codes {tuple(self.codes.shape)}")
        if not all(part.is_contiguous() for part in (self.codes, self.scales, self.zeros)):
            raise KernelInputError("codes, scales and zeros must be contiguous")

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] * 8 // self.scales.shape[0]

    @property
    def span(self) -> int:
        """Columns whose codes lie in the same words."""
        return _widest(self.codes.shape[1] * 8)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def unpacked(self) -> Tensor:
        """Return (out, in) int32, the code of each column."""
        out, words = self.codes.shape[0], self.span // 8
        shifts = torch.arange(0, 32, 4, device=self.codes.device, dtype=torch.int32)
        return ((self.codes.view(out, -1, 1, words) >> shifts.view(8, 1)) & 15).reshape(out, -1)

    def numbers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (out, in), what the codes stand for."""
        scale, zero = (part.float().t().unsqueeze(2) for part in (self.scales, self.zeros))
        return (self.unpacked().view(*scale.shape[:2], -1) * scale + zero).flatten(1).to(dtype)


def quantize_int4(weight: Tensor, group: int = 0) -> Int4Weight:
    """Return `weight` (out, in) rounded to 4 bits, each group from its smallest to its largest number.

    Args:
        weight: any float type.
        group: columns that share a scale; 0 takes the most that can.

    Raises:
        KernelInputError: the group, or any, does not divide the columns.
    """
    out, columns = weight.shape
    span = _widest(columns)
    group = group or span
    if group not in GROUPS or group > span:
        raise KernelInputError(f"a group must be one of {GROUPS} and divide {columns} columns, got {group}")
    grouped = weight.float().view(out, -1, group)
    low, high = grouped.aminmax(dim=-1)
    scale, zero = ((high - low) / _LEVELS).half(), low.half()
    steps = torch.where(scale > 0, scale, 1.0).float()
    codes = ((grouped - zero.float().unsqueeze(2)) / steps.unsqueeze(2)).round().clamp(0, _LEVELS).int()
    shifts = torch.arange(0, 32, 4, device=weight.device, dtype=torch.int32)
    # The bits of a word do not overlap, so that their sum is what they make together, the sign bit included.
    words = (codes.view(out, -1, 8, span // 8) << shifts.view(8, 1)).sum(dim=2, dtype=torch.int32)
    return Int4Weight(words.flatten(1).contiguous(), scale.t().contiguous(), zero.t().contiguous())


def _widest(columns: int) -> int:
    fitting = [span for span in SPANS if columns % span == 0]
    if not fitting:
        raise KernelInputError(f"rows of {columns} weights cannot be cut into groups of {GROUPS[-1]}: keep their type")
    return fitting[0]


def int4_linear(rows: Tensor, weight: Int4Weight, *, backend: Backend | None = None) -> Tensor:
    """Return (tokens, out) in the dtype of `rows`.

    Args:
        rows: (tokens, in), last dimension contiguous. More than `MOST_ROWS` are multiplied by the weights as numbers.
        weight: (out, in).
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    tokens, columns = rows.shape[0], weight.codes.shape[1] * 8
    if rows.dim() != 2 or rows.shape[1] != columns or (rows.numel() and rows.stride(1) != 1):
        raise KernelInputError(f"rows must be (tokens, {columns}) with contiguous rows, got {tuple(rows.shape)}")
    if resolve_backend(rows, backend) is Backend.TORCH or tokens > MOST_ROWS:
        return int4_linear_torch(rows, weight)
    features, span = weight.codes.shape[0], weight.span
    spans, words, parts = columns // span, span // 8, 8 * weight.group // span  # parts of a word in one group
    out = torch.empty((tokens, features), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    if tokens <= _LANE_ROWS:
        block, together = 8, min(next_power_of_2(spans), 128 // words)
        _lanes_kernel[(ceil_div(features, block),)](
            rows, weight.codes, weight.scales, weight.zeros, out, features, spans, rows.stride(0),
            BLOCK=block, TOGETHER=together, WORDS=words, PARTS=parts, HAS_SECOND=tokens == 2, num_warps=4,
        )  # fmt: skip
        return out
    block = 64
    _matrix_kernel[(ceil_div(features, block),)](
        rows, weight.codes, weight.scales, weight.zeros, out, tokens, features, spans, rows.stride(0),
        BLOCK=block, WORDS=words, PARTS=parts, ROWS=MOST_ROWS,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not rows.is_cuda, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def int4_linear_torch(rows: Tensor, weight: Int4Weight) -> Tensor:
    """Return what `int4_linear` returns: the definition, with the weights in the dtype of `rows`."""
    return functional.linear(rows, weight.numbers(rows.dtype))


@launched(do_not_specialize=("spans",))
def _lanes_kernel(
    row_ptr, code_ptr, scale_ptr, zero_ptr, out_ptr, features, spans, stride_rt,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr, WORDS: tl.constexpr, PARTS: tl.constexpr, HAS_SECOND: tl.constexpr,
):  # fmt: skip
    # This program gives BLOCK features of one or two rows. A word's eight codes meet eight parts of a span's columns.
    GROUPS_OF_SPAN: tl.constexpr = 8 // PARTS
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_feature = feature < features
    word = tl.arange(0, WORDS)
    first = tl.zeros((BLOCK, TOGETHER), tl.float32)
    second = tl.zeros((BLOCK, TOGETHER), tl.float32)
    for start in range(0, spans, TOGETHER):
        span = start + tl.arange(0, TOGETHER)
        is_span = span < spans
        known = is_feature[:, None] & is_span[None, :]
        word_at = (span * WORDS)[:, None] + word[None, :]
        code_at = (feature.to(tl.int64) * spans * WORDS)[:, None, None] + word_at[None, :, :]
        words = tl.load(code_ptr + code_at, mask=known[:, :, None], other=0)
        # Each lane loads the columns that its own words meet, so that nothing is exchanged.
        column_at = tl.broadcast_to(((span * (8 * WORDS))[:, None] + word[None, :])[None, :, :], code_at.shape)
        inside = tl.broadcast_to(is_span[None, :, None], code_at.shape)
        for of_span in tl.static_range(GROUPS_OF_SPAN):
            scale_at = (span * GROUPS_OF_SPAN + of_span)[None, :] * features + feature[:, None]
            scale = tl.load(scale_ptr + scale_at, mask=known, other=0.0).to(tl.float32)
            zero = tl.load(zero_ptr + scale_at, mask=known, other=0.0).to(tl.float32) - 128.0 * scale
            products = tl.zeros((BLOCK, TOGETHER, WORDS), tl.float32)
            sums = tl.zeros((BLOCK, TOGETHER, WORDS), tl.float32)
            if HAS_SECOND:
                other_products = tl.zeros((BLOCK, TOGETHER, WORDS), tl.float32)
                other_sums = tl.zeros((BLOCK, TOGETHER, WORDS), tl.float32)
            for part in tl.static_range(of_span * PARTS, of_span * PARTS + PARTS):
                number = _number(words, part)
                part_at = row_ptr + column_at + part * WORDS
                column = tl.load(part_at, mask=inside, other=0.0).to(tl.float32)
                products += number * column
                sums += column
                if HAS_SECOND:
                    column = tl.load(part_at + stride_rt, mask=inside, other=0.0).to(tl.float32)
                    other_products += number * column
                    other_sums += column
            first += tl.sum(products, axis=2) * scale + tl.sum(sums, axis=2) * zero
            if HAS_SECOND:
                second += tl.sum(other_products, axis=2) * scale + tl.sum(other_sums, axis=2) * zero
    out = tl.sum(first, axis=1)
    tl.store(out_ptr + feature, out.to(out_ptr.dtype.element_ty), mask=is_feature)
    if HAS_SECOND:
        out = tl.sum(second, axis=1)
        tl.store(out_ptr + features + feature, out.to(out_ptr.dtype.element_ty), mask=is_feature)


@launched(do_not_specialize=("tokens", "spans"))
def _matrix_kernel(
    row_ptr, code_ptr, scale_ptr, zero_ptr, out_ptr, tokens, features, spans, stride_rt,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program gives BLOCK features of all rows, one span of columns after the other.
    NUMBER: tl.constexpr = row_ptr.dtype.element_ty
    SPAN: tl.constexpr = 8 * WORDS
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_feature = feature < features
    word = tl.arange(0, WORDS)
    row = tl.arange(0, ROWS)
    is_row = row < tokens
    # Unpacked codes come word after word, and of a word as the bits of this number say; columns are loaded alike.
    place = tl.arange(0, SPAN)
    part = (place & 1) * 4 + ((place >> 1) & 1) * 2 + ((place >> 2) & 1)
    column = part * WORDS + place // 8
    summed = tl.zeros((ROWS, BLOCK), tl.float32)
    for span in range(spans):
        code_at = (feature.to(tl.int64) * spans + span)[:, None] * WORDS + word[None, :]
        words = tl.load(code_ptr + code_at, mask=is_feature[:, None], other=0)
        at = row_ptr + row[:, None] * stride_rt + span * SPAN + column[None, :]
        columns = tl.load(at, mask=is_row[:, None], other=0.0)
        scale_at = span * (8 // PARTS) * features + feature
        number_0 = _weight(words, scale_ptr, zero_ptr, scale_at, is_feature, features, 0, PARTS)
        number_1 = _weight(words, scale_ptr, zero_ptr, scale_at, is_feature, features, 1, PARTS)
        number_2 = _weight(words, scale_ptr, zero_ptr, scale_at, is_feature, features, 2, PARTS)
        number_3 = _weight(words, scale_ptr, zero_ptr, scale_at, is_feature, features, 3, PARTS)
        number_4 = _weight(words, scale_ptr, zero_ptr, scale_at, is_feature, features, 4, PARTS)
        number_5 = _weight(words, scale_ptr, zero_ptr, scale_at, is_feature, features, 5, PARTS)
        number_6 = _weight(words, scale_ptr, zero_ptr, scale_at, is_feature, features, 6, PARTS)
        number_7 = _weight(words, scale_ptr, zero_ptr, scale_at, is_feature, features, 7, PARTS)
        low = tl.join(tl.join(number_0, number_1), tl.join(number_2, number_3))
        high = tl.join(tl.join(number_4, number_5), tl.join(number_6, number_7))
        numbers = tl.join(low, high).reshape(BLOCK, SPAN).to(NUMBER)
        if UPCAST:
            columns, numbers = columns.to(tl.float32), numbers.to(tl.float32)
        summed = tl.dot(columns, tl.trans(numbers), acc=summed, input_precision="ieee")
    mask = is_row[:, None] & is_feature[None, :]
    tl.store(out_ptr + row[:, None] * features + feature[None, :], summed.to(NUMBER), mask=mask)


@jit
def _weight(words, scale_ptr, zero_ptr, scale_at, is_feature, features, PART: tl.constexpr, PARTS: tl.constexpr):
    # The weights of each word's codes number PART, fp32. Parts of one group read the same scales.
    at = scale_at + PART // PARTS * features
    scale = tl.load(scale_ptr + at, mask=is_feature, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + at, mask=is_feature, other=0.0).to(tl.float32) - 128.0 * scale
    return _number(words, PART) * scale[:, None] + zero[:, None]


@jit
def _number(words, PART: tl.constexpr):
    # 128 + code, of each word's codes number PART, fp32.
    bits = words << (16 - 4 * PART) if PART < 4 else words >> (4 * PART - 16)
    return ((bits & 0xF0000) | 0x43000000).to(tl.float32, bitcast=True)
