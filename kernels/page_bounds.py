# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""The lowest and the highest number of each channel in each part of listed pages, from their keys' codes.

    lower_part,d = min over rows r of the part of  code_r,d * scale_d + zero_d,     upper_part,d the max of them

Scales are above zero, so of rows that share one the lowest number is that of the lowest code: codes are compared, and
two of each group become numbers. Rounding keeps the order of numbers: bounds in the keys' own type are those of the
decoded keys, bit for bit. Where the bounds' type is narrower, they are moved outward first by a share of themselves:

    lower - margin * |lower|,     upper + margin * |upper|

Which pages are listed and written is a number on the device alone, as a CUDA graph needs it.

Source: bounds of the keys of a page: Quest, arXiv 2406.10774, section 3.3; of its parts: LServe, arXiv 2502.14866,
section 3.5; codes: KIVI, arXiv 2402.02750, section 3. Cost: reads the codes once; bandwidth bound, and of the few pages
of a window no longer than a launch. A thread holds all rows of four neighbouring bytes: nothing is exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.page_scores import KeyBounds
from ragkit.kernels.quantized_blocks import QuantizedBlocks

_COLUMNS = 128  # bytes of a row that a program, which is one warp, compares
_ROWS = 16  # that it holds at a time


def page_bounds(
    keys: QuantizedBlocks, pages: Tensor, bounds: KeyBounds, *, margin: float = 0.0, backend: Backend | None = None
) -> None:
    """Write the bounds of the parts of `pages` into `bounds`, at these pages.

    Args:
        keys: (blocks, page_size, kv_heads, head_dim), page i in block i, of which rows share scales channel by channel.
        pages: (pages,) int64 on the device, distinct; the caller answers for it that they are there.
        bounds: (all_pages, parts, kv_heads, head_dim) each, contiguous, of any float type; a part has
            page_size / parts rows.
        margin: share of a bound by which it is moved outward before it is rounded to the type of `bounds`.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes or types do not fit.
    """
    _check_inputs(keys, pages, bounds, margin)
    if resolve_backend(keys.codes, backend) is Backend.TORCH:
        page_bounds_torch(keys, pages, bounds, margin=margin)
        return
    _, page_size, kv_heads, head_bytes = keys.codes.shape
    parts, width = bounds.lower.shape[1], kv_heads * head_bytes
    if len(pages) == 0 or width == 0:
        return
    columns = min(_COLUMNS, next_power_of_2(width))
    part_rows = page_size // parts
    _page_bounds_kernel[(len(pages) * parts, ceil_div(width, columns))](
        keys.codes, keys.scales, keys.zeros, pages, bounds.lower, bounds.upper, margin,
        PAGE_SIZE=page_size, PART_ROWS=part_rows, ROWS=min(_ROWS, part_rows, keys.row_group),
        KEY_GROUP=keys.row_group, HEAD_BYTES=head_bytes, WIDTH=width, COLUMNS=columns, FOUR_BITS=keys.bits == 4,
        num_warps=1,
    )  # fmt: skip


def page_bounds_torch(keys: QuantizedBlocks, pages: Tensor, bounds: KeyBounds, *, margin: float = 0.0) -> None:
    """Do what `page_bounds` does: the definition."""
    page_size = keys.shape[1]
    slots = (pages.unsqueeze(1) * page_size + torch.arange(page_size, device=pages.device)).flatten()
    _, parts, kv_heads, head_dim = bounds.lower.shape
    numbers = keys.rows(slots).view(len(pages), parts, page_size // parts, kv_heads, head_dim)
    lower, upper = numbers.amin(dim=2), numbers.amax(dim=2)
    bounds.lower.index_copy_(0, pages, (lower - lower.abs() * margin).to(bounds.lower.dtype))
    bounds.upper.index_copy_(0, pages, (upper + upper.abs() * margin).to(bounds.upper.dtype))


def _check_inputs(keys: QuantizedBlocks, pages: Tensor, bounds: KeyBounds, margin: float) -> None:
    _, page_size, kv_heads, head_dim = keys.shape
    if keys.channel_group != 1:
        raise KernelInputError(f"keys must be quantised channel by channel, got groups of {keys.channel_group}")
    if page_size & (page_size - 1) or keys.row_group & (keys.row_group - 1):
        raise KernelInputError(
            f"pages and groups of rows must be powers of two, got {page_size} and {keys.row_group} rows"
        )
    if pages.dim() != 1 or pages.dtype != torch.int64 or not pages.is_contiguous():
        raise KernelInputError(f"pages must be (pages,) int64, contiguous, got {tuple(pages.shape)} {pages.dtype}")
    lower, upper = bounds
    if lower.shape != upper.shape or lower.dtype != upper.dtype or not lower.is_floating_point():
        raise KernelInputError(
            f"both bounds must be alike, of a float type, got {tuple(lower.shape)} {lower.dtype} and "
            f"{tuple(upper.shape)} {upper.dtype}"
        )
    fits = lower.dim() == 4 and lower.shape[2:] == (kv_heads, head_dim) and lower.shape[1] > 0
    if not fits or page_size % lower.shape[1]:
        raise KernelInputError(
            f"bounds must be (pages, parts of {page_size} rows, {kv_heads}, {head_dim}), got {tuple(lower.shape)}"
        )
    if not (lower.is_contiguous() and upper.is_contiguous()):
        raise KernelInputError("bounds must be contiguous")
    if not margin >= 0:
        raise KernelInputError(f"margin must be at least zero, got {margin}")


@jit
def _within(lower, upper, codes, scale_ptr, zero_ptr, at, is_column):
    # The bounds with those of rows (ROWS, COLUMNS) of codes that share the scales at `at`.
    scale = tl.load(scale_ptr + at, mask=is_column, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + at, mask=is_column, other=0.0).to(tl.float32)
    lowest = tl.min(codes, axis=0).to(tl.float32) * scale + zero
    highest = tl.max(codes, axis=0).to(tl.float32) * scale + zero
    return tl.minimum(lower, lowest), tl.maximum(upper, highest)


@jit
def _store_bounds(lower_ptr, upper_ptr, at, lower, upper, margin, is_column):
    NUMBER: tl.constexpr = lower_ptr.dtype.element_ty
    tl.store(lower_ptr + at, (lower - tl.abs(lower) * margin).to(NUMBER), mask=is_column)
    tl.store(upper_ptr + at, (upper + tl.abs(upper) * margin).to(NUMBER), mask=is_column)


@launched
def _page_bounds_kernel(
    code_ptr, scale_ptr, zero_ptr, page_ptr, lower_ptr, upper_ptr, margin,
    PAGE_SIZE: tl.constexpr, PART_ROWS: tl.constexpr, ROWS: tl.constexpr, KEY_GROUP: tl.constexpr,
    HEAD_BYTES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, FOUR_BITS: tl.constexpr,
):  # fmt: skip
    # This program compares COLUMNS bytes of the rows, which hold all heads, of one part of one page.
    PARTS: tl.constexpr = PAGE_SIZE // PART_ROWS
    CHANNELS: tl.constexpr = 2 * WIDTH if FOUR_BITS else WIDTH
    page, part = tl.load(page_ptr + tl.program_id(0) // PARTS), tl.program_id(0) % PARTS
    column = tl.program_id(1) * COLUMNS + tl.max_contiguous(tl.arange(0, COLUMNS), 4)
    is_column = column < WIDTH
    channel = column
    if FOUR_BITS:  # a byte holds two channels half a head apart
        channel = column // HEAD_BYTES * (2 * HEAD_BYTES) + column % HEAD_BYTES
        if HEAD_BYTES % 4 == 0:  # which the division hides from the compiler
            channel = tl.max_contiguous(tl.multiple_of(channel, 4), 4)
    lower, upper = tl.full((COLUMNS,), float("inf"), tl.float32), tl.full((COLUMNS,), float("-inf"), tl.float32)
    if FOUR_BITS:
        high_lower, high_upper = lower, upper
    for start in tl.static_range(0, PART_ROWS, ROWS):
        first = part * PART_ROWS + start
        row = page * PAGE_SIZE + first + tl.arange(0, ROWS)
        codes = tl.load(code_ptr + row[:, None] * WIDTH + column[None, :], mask=is_column[None, :], other=0)
        codes = codes.to(tl.int32)
        at = (page * (PAGE_SIZE // KEY_GROUP) + first // KEY_GROUP) * CHANNELS + channel
        if FOUR_BITS:
            high_lower, high_upper = _within(
                high_lower, high_upper, codes >> 4, scale_ptr, zero_ptr, at + HEAD_BYTES, is_column
            )
            codes = codes & 15
        lower, upper = _within(lower, upper, codes, scale_ptr, zero_ptr, at, is_column)
    at = (page * PARTS + part) * CHANNELS + channel
    _store_bounds(lower_ptr, upper_ptr, at, lower, upper, margin, is_column)
    if FOUR_BITS:
        _store_bounds(lower_ptr, upper_ptr, at + HEAD_BYTES, high_lower, high_upper, margin, is_column)
