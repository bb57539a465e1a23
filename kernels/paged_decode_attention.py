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

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, num_processors, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.merge_splits import merge_splits
from ragkit.kernels.paged_rows import (
    FIELD_ROWS,
    HIDDEN,
    check_paged_rows,
    load_rotated_keys,
    load_values,
    visible_rows_torch,
)

__all__ = ["HIDDEN", "num_splits", "paged_decode_attention", "paged_decode_attention_torch"]


def paged_decode_attention(
    queries: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
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
    backend: Backend | None = None,
) -> Tensor:
    """Return (requests, q_heads, head_dim) in the dtype of `queries`; zeros where a request sees no row.

    Args:
        queries: (requests, q_heads, head_dim), already rotated; heads contiguous.
        key_pool, value_pool: (blocks, block_size, kv_heads, head_dim), contiguous, keys un-rotated.
        block_tables: (requests, max_entries) int32, blocks of each request; entries past `num_entries` are ignored.
        row_positions: (requests, max_entries, block_size) int32, true position of each row, or `HIDDEN`.
        num_entries: (requests,) int32.
        query_positions: (requests,) int64.
        cos, sin: (positions, head_dim / 2) fp32.
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
    check_paged_rows(
        queries, queries.shape[0], key_pool, value_pool, block_tables, row_positions, num_entries, cos, sin,
        key_field, value_field,
    )  # fmt: skip
    if resolve_backend(queries, backend) is Backend.TORCH:
        return paged_decode_attention_torch(
            queries, key_pool, value_pool, block_tables, row_positions, num_entries, query_positions, cos, sin,
            key_field=key_field, value_field=value_field, scale=scale,
        )  # fmt: skip
    requests, q_heads, head_dim = queries.shape
    block_size, kv_heads = key_pool.shape[1], key_pool.shape[2]
    max_entries = block_tables.shape[1]
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    splits = num_splits(requests * kv_heads, max_entries, queries.device)
    partial = torch.empty((requests, q_heads, splits, head_dim), dtype=torch.float32, device=queries.device)
    weights = torch.empty((requests, q_heads, splits), dtype=torch.float32, device=queries.device)
    group = q_heads // kv_heads
    half = head_dim // 2
    # A tile of keys and one of values, twice for loading ahead, must fit shared memory: 64 KB here at most.
    rows = 64 if head_dim * key_pool.element_size() <= 256 else 32
    _paged_decode_attention_kernel[(requests, kv_heads, splits)](
        queries, key_pool, value_pool, block_tables, row_positions, num_entries, query_positions, cos, sin,
        queries if key_field is None else key_field, queries if value_field is None else value_field,
        partial, weights,
        scale * 1.4426950408889634,  # the kernel works with powers of two
        max_entries, queries.stride(0),
        GROUP=group, GROUP_PADDED=max(16, next_power_of_2(group)), KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        DIM_PADDED=max(16, next_power_of_2(head_dim)), HALF_PADDED=max(16, next_power_of_2(half)),
        BLOCK_SIZE=block_size, FIELD_ROWS=FIELD_ROWS, ROWS=min(block_size, rows), SPLITS=splits,
        HAS_FIELD=key_field is not None,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not queries.is_cuda, num_warps=rows // 8, num_stages=2,
    )  # fmt: skip
    merge_splits(partial, weights, out, backend=Backend.TRITON)
    return out


def paged_decode_attention_torch(
    queries: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
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


def num_splits(groups: int, max_entries: int, device: torch.device) -> int:
    """Return into how many parts a request's blocks are split so that all of them fill the device.

    Args:
        groups: requests times key heads.
        max_entries: most blocks that one request may have; it bounds the splits.
        device: where the kernel runs.
    """
    if device.type != "cuda":
        return max(1, min(3, max_entries))  # interpreted: enough to have the merge tested
    processors = num_processors(device)
    return max(1, min(max_entries, 4 * processors // groups, 128))


@launched
def _paged_decode_attention_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, row_position_ptr, num_entries_ptr, query_position_ptr, cos_ptr, sin_ptr,
    key_field_ptr, value_field_ptr, partial_ptr, weight_ptr,
    scale_log2, max_entries, stride_qr,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr, HALF_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, FIELD_ROWS: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, HAS_FIELD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program attends with the query heads of one key head over one part of one request's blocks.
    request, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = HEAD_DIM // 2
    entries = tl.load(num_entries_ptr + request)
    query_position = tl.load(query_position_ptr + request)
    part = (entries + SPLITS - 1) // SPLITS

    head = kv_head * GROUP + tl.arange(0, GROUP_PADDED)
    is_head = tl.arange(0, GROUP_PADDED) < GROUP
    half = tl.arange(0, HALF_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    query_at = query_ptr + request * stride_qr + head[:, None] * HEAD_DIM + half[None, :]
    query_mask = is_head[:, None] & (half < HALF)[None, :]
    query_first = tl.load(query_at, mask=query_mask, other=0.0)
    query_second = tl.load(query_at + HALF, mask=query_mask, other=0.0)
    if UPCAST:
        query_first, query_second = query_first.to(tl.float32), query_second.to(tl.float32)

    highest = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    summed = tl.zeros((GROUP_PADDED, DIM_PADDED), tl.float32)
    first_of_request = tl.program_id(0) * max_entries  # 32 bits: 64 cost a fifth of the registers
    first_entry = split * part
    last_entry = tl.minimum(first_entry + part, entries)
    for step in range(first_entry * (BLOCK_SIZE // ROWS), last_entry * (BLOCK_SIZE // ROWS)):
        entry = first_of_request + step // (BLOCK_SIZE // ROWS)
        row = (step % (BLOCK_SIZE // ROWS)) * ROWS + tl.arange(0, ROWS)
        block = tl.load(table_ptr + entry).to(tl.int64)
        position = tl.load(row_position_ptr + entry * BLOCK_SIZE + row)
        seen = position <= query_position
        row_at = ((block * BLOCK_SIZE + row) * KV_HEADS + kv_head) * HEAD_DIM
        field_at = (
            (entry.to(tl.int64) * (BLOCK_SIZE // FIELD_ROWS) + row // FIELD_ROWS) * KV_HEADS + kv_head
        ) * HEAD_DIM
        turned_first, turned_second = load_rotated_keys(
            key_ptr, key_field_ptr, cos_ptr, sin_ptr, row_at, field_at, position, seen, half, HALF, HAS_FIELD
        )
        if UPCAST:
            turned_first, turned_second = turned_first.to(tl.float32), turned_second.to(tl.float32)
        scores = tl.dot(query_first, tl.trans(turned_first), input_precision="ieee")
        scores = tl.dot(query_second, tl.trans(turned_second), acc=scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale_log2, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # While nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - base)
        exponent = tl.exp2(scores - base[:, None])
        value = load_values(value_ptr, value_field_ptr, row_at, field_at, seen, dim, HEAD_DIM, HAS_FIELD)
        if UPCAST:
            value = value.to(tl.float32)
        total = total * shrink + tl.sum(exponent, axis=1)
        summed = tl.dot(exponent.to(value.dtype), value, acc=summed * shrink[:, None], input_precision="ieee")
        highest = new_highest

    out_at = (request * KV_HEADS * GROUP + head) * SPLITS + split
    safe = tl.where(total > 0, total, 1.0)
    tl.store(weight_ptr + out_at, tl.where(total > 0, highest + tl.log2(safe), float("-inf")), mask=is_head)
    out_mask = is_head[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(partial_ptr + out_at[:, None] * HEAD_DIM + dim[None, :], summed / safe[:, None], mask=out_mask)
