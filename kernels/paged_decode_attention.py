# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Attention of one new token a request over its KV blocks, rotating keys while it loads them.

    out = softmax_j(scale * q . R(p_j) k_j) v_j   over the rows j with p_j <= p_query

Keys lie in the pool un-rotated (so chunk blocks are shared between requests and positions); every row has its own
true position, and a row at `HIDDEN` is seen by no query, which is how replaced and unused rows are left out.
The rows of a request are split over programs whose results are merged by their log-sum-exp.

Source: FlashDecoding's split of keys; online softmax of FlashAttention, arXiv 2205.14135, section 3.1; blocks of
PagedAttention, arXiv 2309.06180. Cost: reads keys and values once; bandwidth bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, num_processors, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.merge_splits import MergeLaunch, call_merge, merge_launch, merge_splits
from ragkit.kernels.paged_rows import (
    FIELD_ROWS,
    HIDDEN,
    Blocks,
    channels_of,
    check_paged_rows,
    load_near_angles,
    load_rotated_keys,
    load_value_codes,
    load_value_field,
    load_values,
    parts_of,
    row_angles,
    stored_as,
    visible_rows_torch,
)

__all__ = [
    "HIDDEN",
    "DecodeTile",
    "decode_tile",
    "launch_paged_decode_attention",
    "num_splits",
    "paged_decode_attention",
    "paged_decode_attention_torch",
]

_PAIRS = 16  # rows of queries that one product of matrices takes, whether they are there or not
_PAIRS_OF_CODES = 32  # rows of queries of two heads


class DecodeTile(NamedTuple):
    """How the work is cut.

    Attributes:
        heads: key heads of which one program reads a row, a divisor of their number.
        rows: read at a time.
        warps: of a program.
        stages: of the pipeline that loads rows ahead.
        adds_angles: those of rows behind a row to its own, where `bases` says that they stand so.
        programs: for each multiprocessor.
        merge: when the kernel that merges the parts is launched, where the device leaves a choice.
        merges_by_warp: a program of one warp merges a few channels of a head.
    """

    heads: int
    rows: int
    warps: int
    stages: int
    adds_angles: bool = False
    programs: int = 4
    merge: MergeLaunch = MergeLaunch.AFTER
    merges_by_warp: bool = False


def paged_decode_attention(
    queries: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    query_positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    bases: Tensor | None = None,
    key_field: Tensor | None = None,
    value_field: Tensor | None = None,
    scale: float,
    backend: Backend | None = None,
) -> Tensor:
    """Return (requests, q_heads, head_dim) in the dtype of `queries`; zeros where a request sees no row.

    Args:
        queries: (requests, q_heads, head_dim), already rotated; heads contiguous.
        key_pool, value_pool: (blocks, block_size, kv_heads, head_dim), contiguous, keys un-rotated; numbers, or codes.
        block_tables: (requests, max_entries) int32, blocks of each request; entries past `num_entries` are ignored.
        row_positions: (requests, max_entries, block_size) int32, true position of each row, or `HIDDEN`.
        num_entries: (requests,) int32.
        query_positions: (requests,) int64.
        cos, sin: (positions, head_dim / 2) fp32; of angles that grow with the position evenly where `bases` is given.
        bases: (requests, max_entries) int32, what `entry_bases` gives; None looks up the angle of every row.
        key_field, value_field: (requests, max_entries, block_size / FIELD_ROWS, kv_heads, head_dim), contiguous, added
            to the rows of each entry, to keys before they are rotated.
        scale: factor on the scores.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    if query_positions.shape != queries.shape[:1]:
        raise KernelInputError(
            f"query_positions must be {tuple(queries.shape[:1])}, got {tuple(query_positions.shape)}"
        )
    if bases is not None and (bases.shape != block_tables.shape or bases.dtype != torch.int32):
        raise KernelInputError(f"bases must be {tuple(block_tables.shape)} int32, got {tuple(bases.shape)}")
    check_paged_rows(
        queries, queries.shape[0], key_pool, value_pool, block_tables, row_positions, num_entries, cos, sin,
        key_field, value_field,
    )  # fmt: skip
    if resolve_backend(queries, backend) is Backend.TORCH:
        return paged_decode_attention_torch(
            queries, key_pool, value_pool, block_tables, row_positions, num_entries, query_positions, cos, sin,
            key_field=key_field, value_field=value_field, scale=scale,
        )  # fmt: skip
    return launch_paged_decode_attention(
        queries, key_pool, value_pool, block_tables, row_positions, num_entries, query_positions, cos, sin,
        bases=bases, key_field=key_field, value_field=value_field, scale=scale,
        tile=decode_tile(queries, key_pool, value_pool),
    )  # fmt: skip


def launch_paged_decode_attention(
    queries: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    query_positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    bases: Tensor | None = None,
    key_field: Tensor | None = None,
    value_field: Tensor | None = None,
    scale: float,
    tile: DecodeTile,
) -> Tensor:
    """Return what `paged_decode_attention` returns, from inputs that it has checked, with the work cut by `tile`."""
    requests, q_heads, head_dim = queries.shape
    block_size, kv_heads = key_pool.shape[1:3]
    max_entries = block_tables.shape[1]
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    bits, key_group, channel_group = stored_as(key_pool, value_pool)
    group, value_groups = q_heads // kv_heads, head_dim // channel_group if bits else 1
    splits = num_splits(requests * kv_heads // tile.heads, max_entries, queries.device, tile.programs)
    partial = torch.empty((requests, q_heads, splits, head_dim), dtype=torch.float32, device=queries.device)
    weights = torch.empty((requests, q_heads, splits), dtype=torch.float32, device=queries.device)
    merge = merge_launch(tile.merge, queries.device)
    _paged_decode_attention_kernel[(requests, kv_heads // tile.heads, splits)](
        queries, *parts_of(key_pool), *parts_of(value_pool), block_tables, row_positions, num_entries,
        query_positions, cos, sin, num_entries if bases is None else bases,
        queries if key_field is None else key_field, queries if value_field is None else value_field,
        partial, weights,
        scale * 1.4426950408889634,  # the kernel works with powers of two
        max_entries, queries.stride(0),
        GROUP=group, VALUE_GROUPS=value_groups, PAIRS=max(_PAIRS, next_power_of_2(tile.heads * group * value_groups)),
        HEADS=tile.heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HALF_PADDED=max(16, next_power_of_2(head_dim // 2)),
        BLOCK_SIZE=block_size, FIELD_ROWS=FIELD_ROWS, ROWS=tile.rows, SPLITS=splits, BITS=bits, KEY_GROUP=key_group,
        HAS_FIELD=key_field is not None, ADDS_ANGLES=tile.adds_angles and bases is not None,
        MERGE_AT_START=merge is MergeLaunch.AT_START, MERGE_AT_END=merge is MergeLaunch.AT_END,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not queries.is_cuda, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    merge_splits(partial, weights, out, launch=merge, by_warp=tile.merges_by_warp, backend=Backend.TRITON)
    return out


def paged_decode_attention_torch(
    queries: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    query_positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    key_field: Tensor | None = None,
    value_field: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Return what `paged_decode_attention` returns: the definition, in fp32, one request after the other."""
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    group = queries.shape[1] // key_pool.shape[2]
    last = query_positions.tolist()
    for index, count in enumerate(num_entries.tolist()):
        fields = [None if field is None else field[index, :count] for field in (key_field, value_field)]
        _, keys, values = visible_rows_torch(
            key_pool, value_pool, block_tables[index, :count], row_positions[index, :count], last[index], cos, sin,
            *fields,
        )  # fmt: skip
        if len(keys) == 0:
            continue
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,rhd->hr", queries[index].float(), keys) * scale
        out[index] = torch.einsum("hr,rhd->hd", scores.softmax(dim=-1), values).to(out.dtype)
    return out


def num_splits(groups: int, max_entries: int, device: torch.device, programs: int) -> int:
    """Return into how many parts a request's blocks are split so that all of them fill the device.

    Args:
        groups: requests times key heads.
        max_entries: most blocks that one request may have; it bounds the splits.
        device: where the kernel runs.
        programs: for each multiprocessor.
    """
    if device.type != "cuda":
        return max(1, min(3, max_entries))  # interpreted: enough to have the merge tested
    processors = num_processors(device)
    return max(1, min(max_entries, programs * processors // groups, 128))


def decode_tile(queries: Tensor, key_pool: Blocks, value_pool: Blocks) -> DecodeTile:
    """Return how the work is cut, as was best on an H100 for one request of 131,072 rows.

    A tile of keys and one of values, twice for loading ahead, must fit shared memory: 64 KB here at most. Rows of a
    tile share the scales of the keys. Where codes are read, two heads share a program, and with it the angles of the
    rows, which weigh more than the codes of a head.
    """
    q_heads, head_dim = queries.shape[1:]
    kv_heads = key_pool.shape[2]
    bits, key_group, channel_group = stored_as(key_pool, value_pool)
    rows = min(64 if not bits and head_dim * queries.element_size() <= 256 else 32, key_group)
    if bits:
        pairs = q_heads // kv_heads * (head_dim // channel_group)  # that the queries of a key head take
        heads = 2 if kv_heads % 2 == 0 and 2 * pairs <= _PAIRS_OF_CODES else 1
        return DecodeTile(heads, rows, max(1, rows // 8), 2, programs=2 if heads == 2 else 3)
    return DecodeTile(1, rows, max(1, min(4, rows // 8)), 2, programs=3 if rows == 64 else 4)


@launched
def _paged_decode_attention_kernel(
    query_ptr, key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr, value_zero_ptr,
    table_ptr, row_position_ptr, num_entries_ptr, query_position_ptr, cos_ptr, sin_ptr, base_ptr,
    key_field_ptr, value_field_ptr, partial_ptr, weight_ptr,
    scale_log2, max_entries, stride_qr,
    GROUP: tl.constexpr, VALUE_GROUPS: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FIELD_ROWS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BITS: tl.constexpr, KEY_GROUP: tl.constexpr,
    HAS_FIELD: tl.constexpr, ADDS_ANGLES: tl.constexpr, MERGE_AT_START: tl.constexpr, MERGE_AT_END: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # This program attends with the query heads of HEADS key heads over one part of one request's blocks. A query head
    # stands in VALUE_GROUPS rows, one for each group of channels of the values: with the group's scale in the weights,
    # a row's product with the codes is right in the channels of its own group.
    call_merge(MERGE_AT_START)
    request, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    first_head = tl.program_id(1) * HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    NUMBER: tl.constexpr = query_ptr.dtype.element_ty
    entries = tl.load(num_entries_ptr + request)
    query_position = tl.load(query_position_ptr + request)

    pair = tl.arange(0, PAIRS)
    value_group, own_head = pair % VALUE_GROUPS, pair // (VALUE_GROUPS * GROUP)
    head = first_head * GROUP + pair // VALUE_GROUPS
    is_pair = pair < HEADS * GROUP * VALUE_GROUPS
    half = tl.arange(0, HALF_PADDED)
    query_at = query_ptr + request * stride_qr + head[:, None] * HEAD_DIM + half[None, :]
    query_mask = is_pair[:, None] & (half < HALF)[None, :]
    query_first = tl.load(query_at, mask=query_mask, other=0.0)
    query_second = tl.load(query_at + HALF, mask=query_mask, other=0.0)
    if UPCAST:
        query_first, query_second = query_first.to(tl.float32), query_second.to(tl.float32)

    near_cos, near_sin = load_near_angles(cos_ptr, sin_ptr, half, ROWS, HALF, ADDS_ANGLES)
    highest = tl.full((PAIRS,), float("-inf"), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    summed = tl.zeros((PAIRS, 2 * HALF_PADDED), tl.float32)
    zeros = tl.zeros((PAIRS,), tl.float32)  # what the zeros of all values add to each channel of a group
    first_of_request = tl.program_id(0) * max_entries  # 32 bits: 64 cost a fifth of the registers
    first_entry, last_entry = split * entries // SPLITS, (split + 1) * entries // SPLITS
    for step in range(first_entry * (BLOCK_SIZE // ROWS), last_entry * (BLOCK_SIZE // ROWS)):
        entry = first_of_request + step // (BLOCK_SIZE // ROWS)
        first_row = (step % (BLOCK_SIZE // ROWS)) * ROWS
        row = first_row + tl.arange(0, ROWS)
        block = tl.load(table_ptr + entry).to(tl.int64)
        position = tl.load(row_position_ptr + entry * BLOCK_SIZE + row)
        seen = position <= query_position
        row_at = (block * BLOCK_SIZE + row) * KV_HEADS + first_head
        group_at = (block * (BLOCK_SIZE // KEY_GROUP) + first_row // KEY_GROUP) * KV_HEADS + first_head
        field_at = (entry.to(tl.int64) * (BLOCK_SIZE // FIELD_ROWS) + row // FIELD_ROWS) * KV_HEADS + first_head
        cos, sin = row_angles(
            cos_ptr, sin_ptr, base_ptr + entry, first_row, query_position, position, seen, near_cos, near_sin, half,
            HALF, ADDS_ANGLES,
        )  # fmt: skip
        scores = tl.full((PAIRS, ROWS), float("-inf"), tl.float32)
        for of_head in tl.static_range(HEADS):
            key_first, key_second = load_rotated_keys(
                key_ptr, key_scale_ptr, key_zero_ptr, key_field_ptr, row_at + of_head, group_at + of_head,
                field_at + of_head, cos, sin, seen, half, HALF, BITS, HAS_FIELD, NUMBER,
            )  # fmt: skip
            if UPCAST:
                key_first, key_second = key_first.to(tl.float32), key_second.to(tl.float32)
            of_all = tl.dot(query_first, tl.trans(key_first), input_precision="ieee")
            of_all = tl.dot(query_second, tl.trans(key_second), acc=of_all, input_precision="ieee")
            # All queries meet this head's keys, and those of the other heads forget it.
            scores = tl.where(seen[None, :] & (own_head == of_head)[:, None], of_all * scale_log2, scores)
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # While nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - base)
        exponent = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(exponent, axis=1)
        summed = summed * shrink[:, None]
        share = exponent
        if BITS > 0:
            known = seen[None, :] & is_pair[:, None]
            scale_at = (row_at[None, :] + own_head[:, None]) * VALUE_GROUPS + value_group[:, None]
            zero = tl.load(value_zero_ptr + scale_at, mask=known, other=0.0).to(tl.float32)
            zeros = zeros * shrink + tl.sum(exponent * zero, axis=1)
            share *= tl.load(value_scale_ptr + scale_at, mask=known, other=0.0).to(tl.float32)
        for of_head in tl.static_range(HEADS):
            if BITS > 0:
                value = load_value_codes(value_ptr, row_at + of_head, seen, HALF, HALF_PADDED, BITS, NUMBER)
            else:
                value = load_values(
                    value_ptr, value_ptr, value_ptr, value_field_ptr, row_at + of_head, field_at + of_head, seen,
                    HALF, HALF_PADDED, 0, 1, HAS_FIELD, NUMBER,
                )  # fmt: skip
            if UPCAST:
                value = value.to(tl.float32)
            own = tl.where((own_head == of_head)[:, None], share, 0.0)
            summed = tl.dot(own.to(value.dtype), value, acc=summed, input_precision="ieee")
            if HAS_FIELD and BITS > 0:
                value = load_value_field(value_field_ptr, field_at + of_head, seen, HALF, HALF_PADDED, NUMBER)
                if UPCAST:
                    value = value.to(tl.float32)
                own = tl.where((own_head == of_head)[:, None], exponent, 0.0)
                summed = tl.dot(own.to(value.dtype), value, acc=summed, input_precision="ieee")
        highest = new_highest

    call_merge(MERGE_AT_END)
    out_at = (request * KV_HEADS * GROUP + head) * SPLITS + split
    safe = tl.where(total > 0, total, 1.0)
    is_first = is_pair & (value_group == 0)
    tl.store(weight_ptr + out_at, tl.where(total > 0, highest + tl.log2(safe), float("-inf")), mask=is_first)
    channel, is_channel = channels_of(tl.arange(0, 2 * HALF_PADDED), HALF, HALF_PADDED)
    own_channel = (channel // (HEAD_DIM // VALUE_GROUPS))[None, :] == value_group[:, None]
    out_mask = is_pair[:, None] & is_channel[None, :] & own_channel
    out = (summed + zeros[:, None]) / safe[:, None]
    tl.store(partial_ptr + out_at[:, None] * HEAD_DIM + channel[None, :], out, mask=out_mask)
