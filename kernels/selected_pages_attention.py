# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Attention over listed pages of a long document: of a new token, or of a window that reads on through the document.

    out_i = softmax_j(scale * q_i . key_j) v_j   over the rows j <= last_row_i of the list (see gather_pages for key_j)

A list holds the sinks, the pages chosen and the local window, ascending, so "up to the own row" is causal and all there
is to mask. Which pages are listed and how many rows are seen is known on the device alone; launches depend on shapes.

Few queries: a program attends over some of the pages, and the parts are merged. R(p + r) = R(p) R(r), so the angles of
a row come of those of a tile of rows, p, and of its place in the tile, r. The latter are the same for all tiles and
stay in registers; from a table of all positions, angles would be as many bytes as the keys and values. R(p) turns the
keys, or back the queries, which are fewer. Values are met by halves, as keys are, and codes of values as they lie: the
scales are in the weights, the zeros apart. Many queries: the pages are packed and rotated once, and
`selected_attention` runs over them. One list for all heads with a position a row, of several requests at once, is what
`paged_decode_attention` takes.

Source: split of the keys: FlashDecoding; online softmax: FlashAttention, arXiv 2205.14135, section 3.1; pages with
positions of their own: TokenSelect, arXiv 2411.02886. Cost: reads the listed rows once (few queries, bandwidth bound),
or 4 * head_dim operations a head and visible (query, row) pair (many, compute bound).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, can_launch_early, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.gather_pages import PageLists, check_page_lists, gather_pages, gather_pages_torch, list_strides
from ragkit.kernels.launched import launched
from ragkit.kernels.merge_splits import (
    MergeLaunch,
    await_kernel_ahead,
    call_merge,
    merge_launch,
    merge_splits,
)
from ragkit.kernels.page_tile import PageTile, num_splits, page_tile
from ragkit.kernels.paged_rows import (
    Blocks,
    load_key_halves,
    load_value_halves,
    load_value_scales,
    parts_of,
    stored_as,
)
from ragkit.kernels.selected_attention import selected_attention, selected_attention_torch

MOST_PAIRS = 64  # tokens times heads of a key head that read the pages directly; more read packed rows
_LOG2_E = 1.4426950408889634  # the kernel works with powers of two


def selected_pages_attention(
    queries: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    lists: PageLists,
    last_rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    scale: float,
    backend: Backend | None = None,
) -> Tensor:
    """Return (tokens, q_heads, head_dim), contiguous, in the dtype of `queries`.

    Args:
        queries: (tokens, q_heads, head_dim), rotated to where they stand among the lists' positions; heads of a token
            contiguous, tokens at any stride.
        key_pool, value_pool: (blocks, block_size, kv_heads, head_dim), contiguous, keys un-rotated; numbers, or codes.
        lists: the pages, those of the queries themselves among them, and their positions.
        last_rows: (tokens,) int32, ascending: the last row of the list that each query sees, row r of the list's page i
            being i * block_size + r. On a GPU the caller answers for that: to look would stop the stream.
        cos, sin: (positions, head_dim / 2) fp32: row p turns by p times what row 1 turns by. Row 0 turns by nothing and
            holds the factor on all rows, where there is one.
        scale: factor on the scores, above zero.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit, or rows on the CPU are not in the list.
    """
    _check_inputs(queries, key_pool, value_pool, lists, last_rows, cos, sin, scale)
    if resolve_backend(queries, backend) is Backend.TORCH:
        return selected_pages_attention_torch(queries, key_pool, value_pool, lists, last_rows, cos, sin, scale=scale)
    if queries.shape[0] * queries.shape[1] // key_pool.shape[2] <= MOST_PAIRS:
        tile = page_tile(key_pool, value_pool, queries.dtype, queries.device, is_turned=len(cos) == 1)
        return launch_few_queries(queries, key_pool, value_pool, lists, last_rows, cos, sin, scale=scale, tile=tile)
    keys, values = gather_pages(key_pool, value_pool, lists, cos, sin, dtype=queries.dtype, backend=Backend.TRITON)
    return selected_attention(queries, keys, values, last_rows, scale=scale, backend=Backend.TRITON)


def selected_pages_attention_torch(
    queries: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    lists: PageLists,
    last_rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Return what `selected_pages_attention` returns: the definition, and what runs on a CPU."""
    keys, values = gather_pages_torch(key_pool, value_pool, lists, cos, sin, dtype=queries.dtype)
    if len(last_rows):  # what nobody sees may hold NaN, of which no product is free
        keys, values = (part[: int(last_rows[-1]) + 1] for part in (keys, values))
    return selected_attention_torch(queries, keys, values, last_rows, scale=scale)


def launch_few_queries(
    queries: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    lists: PageLists,
    last_rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    scale: float,
    tile: PageTile,
) -> Tensor:
    """Return what `selected_pages_attention` returns, of few queries, cut as `tile` says; nothing is checked."""
    tokens, q_heads, head_dim = queries.shape
    _, block_size, kv_heads, _ = key_pool.shape
    out = torch.empty((tokens, q_heads, head_dim), dtype=queries.dtype, device=queries.device)
    if out.numel() == 0:
        return out
    group, listed = q_heads // kv_heads, lists.pages.shape[1]
    bits, key_group, channel_group = stored_as(key_pool, value_pool)
    value_groups = head_dim // 2 // channel_group if bits else 1  # of half a row
    packed = tokens * group
    pairs = max(16, min(MOST_PAIRS, next_power_of_2(packed * value_groups)))
    tiles = ceil_div(packed * value_groups, pairs)
    programs = tiles * kv_heads
    splits = num_splits(programs, listed, tile, queries.device)
    partial = torch.empty((tokens, q_heads, splits, head_dim), dtype=torch.float32, device=queries.device)
    weights = torch.empty((tokens, q_heads, splits), dtype=torch.float32, device=queries.device)
    is_turned = len(cos) == 1  # all pages stand at 0 then
    turns_queries = tile.turns_queries and pairs <= tile.rows
    merge = merge_launch(tile.merge, queries.device)
    starts_early = tile.starts_early and can_launch_early(queries.device)
    # Triton 3.6 does not compile a loop that carries a place of two lookups, one of which depends on the other.
    looks_ahead = tile.looks_ahead and lists.blocks is None
    _few_queries_kernel[(tiles, kv_heads, splits)](
        queries, *parts_of(key_pool), *parts_of(value_pool), lists.pages, lists.positions,
        lists.pages if lists.blocks is None else lists.blocks, last_rows, cos, sin, partial, weights,
        scale * _LOG2_E, packed, listed, splits, len(cos), queries.stride(0), *list_strides(lists),
        GROUP=group, VALUE_GROUPS=value_groups, PAIRS=pairs, KV_HEADS=kv_heads, HALF=head_dim // 2,
        HALF_PADDED=max(16, next_power_of_2(head_dim // 2)), BLOCK_SIZE=block_size, ROWS=tile.rows, BITS=bits,
        KEY_GROUP=key_group, HAS_BLOCKS=lists.blocks is not None,
        TURNS_KEYS=not (is_turned or turns_queries), TURNS_QUERIES=turns_queries and not is_turned,
        STAGES=tile.stages, LOOKS_AHEAD=looks_ahead, WAITS=starts_early,
        MERGE_AT_START=merge is MergeLaunch.AT_START, MERGE_AT_END=merge is MergeLaunch.AT_END,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not queries.is_cuda, num_warps=tile.warps, **({"launch_pdl": True} if starts_early else {}),
    )  # fmt: skip
    merge_splits(partial, weights, out, launch=merge, by_warp=tile.merges_by_warp, backend=Backend.TRITON)
    return out


def _check_inputs(
    queries: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    lists: PageLists,
    last_rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
) -> None:
    check_page_lists(key_pool, value_pool, lists, cos, sin)
    _, block_size, kv_heads, head_dim = key_pool.shape
    if queries.dim() != 3 or queries.shape[2] != head_dim:
        raise KernelInputError(f"queries must be (tokens, heads, {head_dim}), got {tuple(queries.shape)}")
    if queries.numel() and queries.stride()[1:] != (head_dim, 1):
        raise KernelInputError(f"the heads of one token of queries must be contiguous, got strides {queries.stride()}")
    tokens, q_heads = queries.shape[:2]
    if kv_heads == 0 or q_heads % kv_heads:
        raise KernelInputError(f"{q_heads} query heads cannot share {kv_heads} key heads")
    if not scale > 0:
        raise KernelInputError(f"scale must be above zero, got {scale}")
    if last_rows.shape != (tokens,) or last_rows.dtype != torch.int32 or not last_rows.is_contiguous():
        raise KernelInputError(f"last_rows must be ({tokens},) int32, got {tuple(last_rows.shape)} {last_rows.dtype}")
    rows = lists.pages.shape[1] * block_size
    if tokens and rows == 0:
        raise KernelInputError(f"{tokens} queries need a page to attend to, the list has none")
    if tokens and last_rows.device.type == "cpu":
        ascending = bool((last_rows.diff() > 0).all())
        if not ascending or not 0 <= int(last_rows[0]) <= int(last_rows[-1]) < rows:
            raise KernelInputError(f"last_rows must be ascending rows below {rows}: each query's own row in the list")


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("packed", "listed", "splits", "angles", "stride_list", "stride_position"))
def _few_queries_kernel(
    query_ptr, key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr, value_zero_ptr,
    page_ptr, page_position_ptr, block_ptr, last_row_ptr, cos_ptr, sin_ptr, partial_ptr, weight_ptr,
    scale_log2, packed, listed, splits, angles, stride_qt, stride_list, stride_position,
    GROUP: tl.constexpr, VALUE_GROUPS: tl.constexpr, PAIRS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr, HAS_BLOCKS: tl.constexpr, TURNS_KEYS: tl.constexpr, TURNS_QUERIES: tl.constexpr,
    STAGES: tl.constexpr, LOOKS_AHEAD: tl.constexpr, WAITS: tl.constexpr, MERGE_AT_START: tl.constexpr,
    MERGE_AT_END: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program attends with PAIRS queries (heads within tokens) of one key head over one part of its pages. A query
    # stands in VALUE_GROUPS rows, one for each group of channels in a half of the values: with the group's scale in the
    # weights, a row's product with the codes is right in the channels of its own group.
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    NUMBER: tl.constexpr = query_ptr.dtype.element_ty
    HEAD_DIM: tl.constexpr = 2 * HALF
    PARTS: tl.constexpr = BLOCK_SIZE // ROWS
    CODES: tl.constexpr = HALF if BITS == 4 else HEAD_DIM  # entries of a row of one head in the pools
    SCALES: tl.constexpr = 2 * VALUE_GROUPS
    call_merge(MERGE_AT_START)
    await_kernel_ahead(WAITS)
    pair = tile * PAIRS + tl.arange(0, PAIRS)
    value_group, query = pair % VALUE_GROUPS, pair // VALUE_GROUPS
    is_pair = query < packed
    token, head = (query // GROUP).to(tl.int64), kv_head * GROUP + query % GROUP
    half = tl.arange(0, HALF_PADDED)
    is_channel = half < HALF
    query_at = query_ptr + (token * stride_qt + head * HEAD_DIM)[:, None] + half[None, :]
    query_mask = is_pair[:, None] & is_channel[None, :]
    query_first = tl.load(query_at, mask=query_mask, other=0.0)
    query_second = tl.load(query_at + HALF, mask=query_mask, other=0.0)
    last_row = tl.load(last_row_ptr + token, mask=is_pair, other=-1)
    last = tl.max(last_row, axis=0)

    entries = tl.minimum(last // BLOCK_SIZE + 1, listed)
    part = (listed + splits - 1) // splits  # pages that nobody sees yet leave programs without work
    first_entry = split * part
    last_entry = tl.minimum(first_entry + part, entries)
    list_at, position_at = kv_head * stride_list, kv_head * stride_position
    factor = tl.load(cos_ptr + half, mask=is_channel, other=1.0)[None, :]
    if TURNS_KEYS or TURNS_QUERIES:  # the angles of a tile's rows behind its first
        near_row = tl.arange(0, ROWS)[:, None]
        near = near_row * HALF + half[None, :]
        near_mask = (near_row < angles) & is_channel[None, :]
        near_cos = tl.load(cos_ptr + near, mask=near_mask, other=0.0) / factor
        near_sin = tl.load(sin_ptr + near, mask=near_mask, other=0.0) / factor
    else:  # all rows stand at 0
        query_first = (query_first.to(tl.float32) * factor).to(NUMBER)
        query_second = (query_second.to(tl.float32) * factor).to(NUMBER)
    if UPCAST:
        query_first, query_second = query_first.to(tl.float32), query_second.to(tl.float32)

    highest = tl.full((PAIRS,), float("-inf"), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    # Halves of the values apart: codes of 4 bits need not be joined, and rotation needs the keys' so.
    summed_first = tl.zeros((PAIRS, HALF_PADDED), tl.float32)
    summed_second = tl.zeros((PAIRS, HALF_PADDED), tl.float32)
    zero_first = tl.zeros((PAIRS,), tl.float32)  # what the zeros of all values add to each channel of a group
    zero_second = tl.zeros((PAIRS,), tl.float32)
    if LOOKS_AHEAD:
        next_block, next_start = _place(
            page_ptr + list_at, page_position_ptr + position_at, first_entry, listed, TURNS_KEYS or TURNS_QUERIES
        )
    for step in tl.range(first_entry * PARTS, last_entry * PARTS, num_stages=STAGES):
        entry = step // PARTS
        if LOOKS_AHEAD:
            block, start = next_block, next_start
            next_block, next_start = _place(
                page_ptr + list_at,
                page_position_ptr + position_at,
                (step + 1) // PARTS,
                listed,
                TURNS_KEYS or TURNS_QUERIES,
            )
        else:
            block = _block(page_ptr + list_at + entry, block_ptr, HAS_BLOCKS)
        first_row = step % PARTS * ROWS
        row = first_row + tl.arange(0, ROWS)
        seen = entry * BLOCK_SIZE + row <= last
        # The block's place is one number, and within it 32 bits do: 64 for each row cost a third of the registers.
        head_at = block.to(tl.int64) * (BLOCK_SIZE * KV_HEADS) + kv_head
        group_at = (block.to(tl.int64) * (BLOCK_SIZE // KEY_GROUP) + first_row // KEY_GROUP) * KV_HEADS + kv_head
        row_at = row * KV_HEADS
        if BITS > 0:  # first of all: these loads are too small to be under way ahead
            first_scale, first_zero = load_value_scales(
                value_scale_ptr + head_at * SCALES, value_zero_ptr + head_at * SCALES, row_at, value_group, seen,
                VALUE_GROUPS,
            )  # fmt: skip
            second_scale, second_zero = load_value_scales(
                value_scale_ptr + head_at * SCALES + VALUE_GROUPS, value_zero_ptr + head_at * SCALES + VALUE_GROUPS,
                row_at, value_group, seen, VALUE_GROUPS,
            )  # fmt: skip
        turned_first, turned_second = query_first, query_second
        if BITS > 0 or TURNS_KEYS or TURNS_QUERIES:
            key_first, key_second = load_key_halves(
                key_ptr + head_at * CODES,
                key_scale_ptr,
                key_zero_ptr,
                row_at,
                group_at,
                seen,
                half,
                HALF,
                BITS,
                BITS > 0,
            )
        else:
            key_first, key_second = load_value_halves(key_ptr + head_at * CODES, row_at, seen, half, HALF, 0, NUMBER)
        if TURNS_KEYS or TURNS_QUERIES:
            # A page of negative position stands at 0 with all rows.
            if not LOOKS_AHEAD:
                start = tl.load(page_position_ptr + position_at + entry)
            turned_first, turned_second, key_first, key_second = _turned(
                query_first, query_second, key_first, key_second, start, first_row, near_cos, near_sin,
                cos_ptr, sin_ptr, half, HALF, TURNS_QUERIES,
            )  # fmt: skip
        key_first, key_second = key_first.to(NUMBER), key_second.to(NUMBER)
        value_first, value_second = load_value_halves(
            value_ptr + head_at * CODES, row_at, seen, half, HALF, BITS, NUMBER
        )
        if UPCAST:
            key_first, key_second = key_first.to(tl.float32), key_second.to(tl.float32)
            value_first, value_second = value_first.to(tl.float32), value_second.to(tl.float32)
        scores = tl.dot(turned_first, tl.trans(key_first), input_precision="ieee")
        scores = tl.dot(turned_second, tl.trans(key_second), acc=scores, input_precision="ieee")
        visible = (entry * BLOCK_SIZE + row)[None, :] <= last_row[:, None]
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # While nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - base)
        exponent = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(exponent, axis=1)
        share_first, share_second = exponent, exponent
        if BITS > 0:
            zero_first = zero_first * shrink + tl.sum(exponent * first_zero, axis=1)
            zero_second = zero_second * shrink + tl.sum(exponent * second_zero, axis=1)
            share_first, share_second = exponent * first_scale, exponent * second_scale
        shrink = shrink[:, None]
        share_first, share_second = share_first.to(value_first.dtype), share_second.to(value_first.dtype)
        summed_first = tl.dot(share_first, value_first, acc=summed_first * shrink, input_precision="ieee")
        summed_second = tl.dot(share_second, value_second, acc=summed_second * shrink, input_precision="ieee")
        highest = new_highest

    call_merge(MERGE_AT_END)
    out_at = (token * (KV_HEADS * GROUP) + head) * splits + split
    safe = tl.where(total > 0, total, 1.0)
    is_first = is_pair & (value_group == 0)
    tl.store(weight_ptr + out_at, tl.where(total > 0, highest + tl.log2(safe), float("-inf")), mask=is_first)
    in_group = (half // (HALF // VALUE_GROUPS))[None, :] == value_group[:, None]
    out_mask = is_pair[:, None] & is_channel[None, :] & in_group
    partial_at = partial_ptr + out_at[:, None] * HEAD_DIM + half[None, :]
    tl.store(partial_at, (summed_first + zero_first[:, None]) / safe[:, None], mask=out_mask)
    tl.store(partial_at + HALF, (summed_second + zero_second[:, None]) / safe[:, None], mask=out_mask)


@jit
def _block(page_ptr, block_ptr, HAS_BLOCKS: tl.constexpr):
    block = tl.load(page_ptr)
    if HAS_BLOCKS:
        block = tl.load(block_ptr + block)
    return block


@jit
def _place(page_ptr, position_ptr, entry, listed, TURNS: tl.constexpr):
    # Where a page lies and stands. The list is read within its ends for any entry, and before it is known how many are
    # seen.
    within = tl.minimum(entry, listed - 1)
    block = tl.load(page_ptr + within)
    start = 0
    if TURNS:
        start = tl.load(position_ptr + within)
    return block, start


@jit
def _turned(
    query_first, query_second, key_first, key_second, start, first_row, near_cos, near_sin, cos_ptr, sin_ptr, half,
    HALF: tl.constexpr, TURNS_QUERIES: tl.constexpr,
):  # fmt: skip
    # Both halves of queries and keys, so that their products are those of keys turned to where they stand.
    far = tl.where(start < 0, 0, start + first_row).to(tl.int64) * HALF + half
    far_cos = tl.load(cos_ptr + far, mask=half < HALF, other=0.0)[None, :]
    far_sin = tl.load(sin_ptr + far, mask=half < HALF, other=0.0)[None, :]
    if TURNS_QUERIES:  # back by the angles of the tile's first row; its rows forth by what they are behind it
        first, second = query_first.to(tl.float32), query_second.to(tl.float32)
        query_second = (second * far_cos - first * far_sin).to(query_first.dtype)
        query_first = (first * far_cos + second * far_sin).to(query_first.dtype)
        if start >= 0:
            turned = key_first * near_cos - key_second * near_sin
            key_second = key_second * near_cos + key_first * near_sin
            key_first = turned
    else:
        if start >= 0:
            cos, sin = far_cos * near_cos - far_sin * near_sin, far_sin * near_cos + far_cos * near_sin
        else:
            cos, sin = tl.broadcast_to(far_cos, near_cos.shape), tl.broadcast_to(far_sin, near_cos.shape)
        turned = key_first * cos - key_second * sin
        key_second = key_second * cos + key_first * sin
        key_first = turned
    return query_first, query_second, key_first, key_second
