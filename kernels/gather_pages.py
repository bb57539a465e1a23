# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Copy the rows of listed pages behind each other, keys rotated to where their pages are to stand.

    key_(i * size + r) = R(p_i + r) k_(page_i, r),   or R(0) k where p_i < 0;   value_(i * size + r) = v_(page_i, r)

A list names pages of a long document in ascending order and gives each a position of its own: contiguous ones within
the model's trained window, whatever lies between the pages in the document. A page of negative position stands at
position 0 with all its rows, so that everything that is far stands at one distance. Each key head may have a list of
its own. Rows so packed serve many queries: attention over them rotates no key again for every tile of queries.

Source: positions by rank: TokenSelect, arXiv 2411.02886, section 4; one distance for all that is far: InfLLM, arXiv
2402.04617, section 3.2. Cost: reads and writes each row once; bandwidth bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.paged_rows import (
    Blocks,
    channels_of,
    load_angles,
    load_rotated_keys,
    load_values,
    parts_of,
    stored_as,
)
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kernels.rotation import rotate_into


class PageLists(NamedTuple):
    """Which pages are attended to, and where they stand.

    Attributes:
        pages: (lists, listed) int32 on the device, one list of all key heads or one of each; every entry is a page
            that can be read, those behind the last that counts as well.
        positions: (lists or 1, listed) int32, position of the first row of each; the row r of a page stands r behind
            it, or at 0 like all its rows where the position is negative.
        blocks: (pages of the document,) int32, the block of the pools that holds each page; None where pages are
            numbered as blocks are.
    """

    pages: Tensor
    positions: Tensor
    blocks: Tensor | None = None


def gather_pages(
    key_pool: Blocks,
    value_pool: Blocks,
    lists: PageLists,
    cos: Tensor,
    sin: Tensor,
    *,
    dtype: torch.dtype,
    out: tuple[Tensor, Tensor] | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(keys, values)`, both (listed * block_size, kv_heads, head_dim) of `dtype`, keys rotated.

    Args:
        key_pool, value_pool: (blocks, block_size, kv_heads, head_dim), contiguous, keys un-rotated; numbers, or codes.
        lists: what is copied.
        cos, sin: (positions, head_dim / 2) fp32; the caller answers for it that no listed row stands beyond.
        dtype: of the result.
        out: where to write, instead of new tensors; contiguous, and with fewer rows where the last page is not full.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    check_page_lists(key_pool, value_pool, lists, cos, sin)
    listed = lists.pages.shape[1]
    _, block_size, kv_heads, head_dim = key_pool.shape
    size = (listed * block_size, kv_heads, head_dim)
    if out is not None:
        _check_target(out, size, dtype)
    if resolve_backend(cos, backend) is Backend.TORCH:
        packed = gather_pages_torch(key_pool, value_pool, lists, cos, sin, dtype=dtype)
        if out is None:
            return packed
        for target, part in zip(out, packed, strict=True):
            target.copy_(part[: len(target)])
        return out
    if out is None:
        out = torch.empty(size, dtype=dtype, device=cos.device), torch.empty(size, dtype=dtype, device=cos.device)
    keys, values = out
    if keys.numel() == 0:
        return keys, values
    bits, key_group, channel_group = stored_as(key_pool, value_pool)
    rows = min(64 if head_dim <= 128 else 32, key_group)
    _gather_pages_kernel[(listed * (block_size // rows), kv_heads)](
        keys, values, *parts_of(key_pool), *parts_of(value_pool), lists.pages, lists.positions,
        lists.pages if lists.blocks is None else lists.blocks, cos, sin,
        *list_strides(lists), len(keys),
        KV_HEADS=kv_heads, HALF=head_dim // 2, HALF_PADDED=max(16, next_power_of_2(head_dim // 2)),
        BLOCK_SIZE=block_size, ROWS=rows, BITS=bits, KEY_GROUP=key_group, CHANNEL_GROUP=channel_group,
        HAS_BLOCKS=lists.blocks is not None, num_warps=max(1, min(8, rows // 8)),
    )  # fmt: skip
    return keys, values


def gather_pages_torch(
    key_pool: Blocks, value_pool: Blocks, lists: PageLists, cos: Tensor, sin: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what `gather_pages` returns: the definition."""
    _, block_size, kv_heads, head_dim = key_pool.shape
    row = torch.arange(block_size, device=cos.device)
    size = (lists.pages.shape[1] * block_size, kv_heads, head_dim)
    keys, values = (torch.empty(size, dtype=dtype, device=cos.device) for _ in range(2))
    heads_of_list = kv_heads // len(lists.pages)
    positions = lists.positions.expand(lists.pages.shape)
    for index, (pages, starts) in enumerate(zip(lists.pages.long(), positions.long(), strict=True)):
        heads = slice(index * heads_of_list, (index + 1) * heads_of_list)
        blocks = pages if lists.blocks is None else lists.blocks.long()[pages]
        slots = (blocks[:, None] * block_size + row).flatten()
        at = torch.where(starts[:, None] < 0, 0, starts[:, None] + row).flatten()
        rotate_into(keys[:, heads], _rows(key_pool, slots, heads), cos[at], sin[at])
        values[:, heads] = _rows(value_pool, slots, heads).to(dtype)
    return keys, values


def check_page_lists(key_pool: Blocks, value_pool: Blocks, lists: PageLists, cos: Tensor, sin: Tensor) -> None:
    """Raise `KernelInputError` unless the lists can be read from the pools."""
    if len(key_pool.shape) != 4 or key_pool.shape != value_pool.shape or key_pool.shape[3] % 2:
        raise KernelInputError(
            "pools must be (blocks, block_size, kv_heads, an even head_dim) alike, "
            f"got {tuple(key_pool.shape)}, {tuple(value_pool.shape)}"
        )
    _check_stored_alike(key_pool, value_pool)
    block_size, kv_heads, head_dim = key_pool.shape[1:]
    together = stored_as(key_pool, value_pool)[1]  # rows that share a scale, or all of a block
    if block_size & (block_size - 1) or together & (together - 1) or together < 16:
        raise KernelInputError(
            f"blocks and groups of rows must be powers of two from 16 rows on, got {block_size} and {together}"
        )
    _check_lists(lists, kv_heads)
    for table in (cos, sin):
        if table.dim() != 2 or table.shape[1] * 2 != head_dim or not table.is_contiguous():
            raise KernelInputError(f"cos and sin must be (positions, {head_dim // 2}), got {tuple(table.shape)}")


def _check_target(out: tuple[Tensor, Tensor], size: tuple[int, int, int], dtype: torch.dtype) -> None:
    for part in out:
        fits = part.dim() == 3 and part.shape[1:] == size[1:] and len(part) <= size[0]
        if not fits or part.dtype != dtype or not part.is_contiguous() or len(part) != len(out[0]):
            raise KernelInputError(
                f"out must be two of (at most {size[0]}, {size[1]}, {size[2]}) {dtype}, contiguous, got "
                f"{tuple(part.shape)} {part.dtype}"
            )


def _check_stored_alike(key_pool: Blocks, value_pool: Blocks) -> None:
    if isinstance(key_pool, QuantizedBlocks) and isinstance(value_pool, QuantizedBlocks):
        fits = (key_pool.bits, key_pool.channel_group, value_pool.row_group) == (value_pool.bits, 1, 1)
        if not fits:
            raise KernelInputError("keys must be quantised channel by channel and values row by row, to equal bits")
        return
    if isinstance(key_pool, QuantizedBlocks) or isinstance(value_pool, QuantizedBlocks):
        raise KernelInputError("keys and values must both be numbers or both be codes")
    if key_pool.dtype != value_pool.dtype or not (key_pool.is_contiguous() and value_pool.is_contiguous()):
        raise KernelInputError("pools must be contiguous and of one type")


def _check_lists(lists: PageLists, kv_heads: int) -> None:
    pages, positions, blocks = lists
    if pages.dim() != 2 or pages.shape[0] not in (1, kv_heads):
        raise KernelInputError(f"pages must be (1 or {kv_heads}, listed), got {tuple(pages.shape)}")
    if positions.shape not in ((1, pages.shape[1]), pages.shape):
        raise KernelInputError(f"positions must be {tuple(pages.shape)} or one row, got {tuple(positions.shape)}")
    for name, table in (("pages", pages), ("positions", positions), ("blocks", blocks)):
        if table is not None and (table.dtype != torch.int32 or not table.is_contiguous()):
            raise KernelInputError(f"{name} must be int32 and contiguous, got {table.dtype}")
    if blocks is not None and blocks.dim() != 1:
        raise KernelInputError(f"blocks must be (pages,), got {tuple(blocks.shape)}")


def list_strides(lists: PageLists) -> tuple[int, int]:
    """Return how far the lists of two key heads, and their positions, lie apart: 0 where the heads share them."""
    listed = lists.pages.shape[1]
    return listed if len(lists.pages) > 1 else 0, listed if len(lists.positions) > 1 else 0


def _rows(pool: Blocks, slots: Tensor, heads: slice) -> Tensor:
    if isinstance(pool, QuantizedBlocks):
        return pool.rows(slots)[:, heads]
    return pool.flatten(0, 1)[:, heads][slots]


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("stride_list", "stride_position", "out_rows"))
def _gather_pages_kernel(
    out_key_ptr, out_value_ptr, key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr, value_zero_ptr,
    page_ptr, page_position_ptr, block_ptr, cos_ptr, sin_ptr, stride_list, stride_position, out_rows,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, KEY_GROUP: tl.constexpr, CHANNEL_GROUP: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
):  # fmt: skip
    # This program copies ROWS rows of one head of one listed page.
    NUMBER: tl.constexpr = out_key_ptr.dtype.element_ty
    entry, kv_head = tl.program_id(0) // (BLOCK_SIZE // ROWS), tl.program_id(1)
    first_row = tl.program_id(0) % (BLOCK_SIZE // ROWS) * ROWS
    row = first_row + tl.arange(0, ROWS)
    block = tl.load(page_ptr + kv_head * stride_list + entry)
    start = tl.load(page_position_ptr + kv_head * stride_position + entry)
    if HAS_BLOCKS:
        block = tl.load(block_ptr + block)
    block = block.to(tl.int64)
    every = row >= 0
    half = tl.arange(0, HALF_PADDED)
    cos, sin = load_angles(cos_ptr, sin_ptr, tl.where(start < 0, 0, start + row), every, half, HALF)
    row_at = (block * BLOCK_SIZE + row) * KV_HEADS + kv_head
    group_at = (block * (BLOCK_SIZE // KEY_GROUP) + first_row // KEY_GROUP) * KV_HEADS + kv_head
    first, second = load_rotated_keys(
        key_ptr, key_scale_ptr, key_zero_ptr, key_ptr, row_at, group_at, row_at, cos, sin, every, half,
        HALF, BITS, False, NUMBER,
    )  # fmt: skip
    value = load_values(
        value_ptr, value_scale_ptr, value_zero_ptr, value_ptr, row_at, row_at, every,
        HALF, HALF_PADDED, BITS, CHANNEL_GROUP, False, NUMBER,
    )  # fmt: skip
    out_at = (((entry * BLOCK_SIZE + row).to(tl.int64) * KV_HEADS + kv_head) * (2 * HALF))[:, None]
    has_room = (entry * BLOCK_SIZE + row < out_rows)[:, None]
    tl.store(out_key_ptr + out_at + half[None, :], first, mask=has_room & (half < HALF)[None, :])
    tl.store(out_key_ptr + out_at + HALF + half[None, :], second, mask=has_room & (half < HALF)[None, :])
    channel, is_channel = channels_of(tl.arange(0, 2 * HALF_PADDED), HALF, HALF_PADDED)
    tl.store(out_value_ptr + out_at + channel[None, :], value, mask=has_room & is_channel[None, :])
