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
from ragkit.kernels.backend import Backend, jit, next_power_of_2, resolve_backend, tl

HIDDEN = 2**31 - 1  # position of a row that no query may see


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
        scale: factor on the scores.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(queries, key_pool, value_pool, block_tables, row_positions, num_entries, query_positions, cos, sin)
    if resolve_backend(queries, backend) is Backend.TORCH:
        return paged_decode_attention_torch(
            queries, key_pool, value_pool, block_tables, row_positions, num_entries, query_positions, cos, sin,
            scale=scale,
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
        partial, weights,
        scale * 1.4426950408889634,  # the kernel works with powers of two
        max_entries, queries.stride(0),
        GROUP=group, GROUP_PADDED=max(16, next_power_of_2(group)), KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        DIM_PADDED=max(16, next_power_of_2(head_dim)), HALF_PADDED=max(16, next_power_of_2(half)),
        BLOCK_SIZE=block_size, ROWS=min(block_size, rows), SPLITS=splits,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not queries.is_cuda, num_warps=rows // 8, num_stages=2,
    )  # fmt: skip
    _merge_splits_kernel[(requests, q_heads)](
        partial, weights, out,
        HEAD_DIM=head_dim, DIM_PADDED=max(16, next_power_of_2(head_dim)), SPLITS=splits,
        SPLITS_PADDED=next_power_of_2(splits),
    )  # fmt: skip
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
    scale: float,
) -> Tensor:
    """Return what `paged_decode_attention` returns: the definition, in fp32, one request after the other."""
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    group = queries.shape[1] // key_pool.shape[2]
    for index, count in enumerate(num_entries.tolist()):
        blocks = block_tables[index, :count].long()
        positions = row_positions[index, :count].flatten()
        seen = (positions <= query_positions[index]).nonzero().squeeze(1)
        if seen.numel() == 0:
            continue
        keys = key_pool[blocks].flatten(0, 1)[seen].float()  # (rows, kv_heads, head_dim)
        values = value_pool[blocks].flatten(0, 1)[seen].float()
        at = positions[seen].long()
        first, second = keys.chunk(2, dim=-1)
        row_cos, row_sin = cos[at].unsqueeze(1), sin[at].unsqueeze(1)
        turned = torch.cat((first * row_cos - second * row_sin, second * row_cos + first * row_sin), dim=-1)
        turned, values = turned.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,rhd->hr", queries[index].float(), turned) * scale
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
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(max_entries, 4 * processors // groups, 128))


def _check_inputs(
    queries: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    query_positions: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    if queries.dim() != 3 or (queries.numel() and queries.stride()[1:] != (queries.shape[2], 1)):
        raise KernelInputError(f"queries must be (requests, heads, head_dim), got {tuple(queries.shape)}")
    requests, q_heads, head_dim = queries.shape
    if key_pool.dim() != 4 or key_pool.shape != value_pool.shape or key_pool.shape[3] != head_dim:
        raise KernelInputError(
            f"pools must be (blocks, block_size, kv_heads, {head_dim}) alike, "
            f"got {tuple(key_pool.shape)}, {tuple(value_pool.shape)}"
        )
    if not (key_pool.is_contiguous() and value_pool.is_contiguous()):
        raise KernelInputError("pools must be contiguous")
    if q_heads % key_pool.shape[2]:
        raise KernelInputError(f"{q_heads} query heads cannot share {key_pool.shape[2]} key heads")
    entries = block_tables.shape[-1]
    shapes = (block_tables.shape, row_positions.shape, num_entries.shape, query_positions.shape)
    if shapes != ((requests, entries), (requests, entries, key_pool.shape[1]), (requests,), (requests,)):
        raise KernelInputError(f"tables must be of {requests} requests, got {[tuple(shape) for shape in shapes]}")
    if block_tables.numel() and not (block_tables.is_contiguous() and row_positions.is_contiguous()):
        raise KernelInputError("block_tables and row_positions must be contiguous")
    if cos.shape != sin.shape or cos.shape[-1] * 2 != head_dim or not (cos.is_contiguous() and sin.is_contiguous()):
        raise KernelInputError(f"cos and sin must be (positions, {head_dim // 2}), got {tuple(cos.shape)}")


@jit
def _paged_decode_attention_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, row_position_ptr, num_entries_ptr, query_position_ptr, cos_ptr, sin_ptr,
    partial_ptr, weight_ptr,
    scale_log2, max_entries, stride_qr,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr, HALF_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, UPCAST: tl.constexpr,
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
    first_entry = split * part
    last_entry = tl.minimum(first_entry + part, entries)
    for step in range(first_entry * (BLOCK_SIZE // ROWS), last_entry * (BLOCK_SIZE // ROWS)):
        entry = step // (BLOCK_SIZE // ROWS)
        row = (step % (BLOCK_SIZE // ROWS)) * ROWS + tl.arange(0, ROWS)
        block = tl.load(table_ptr + request * max_entries + entry).to(tl.int64)
        position = tl.load(row_position_ptr + (request * max_entries + entry) * BLOCK_SIZE + row)
        seen = position <= query_position
        at = ((block * BLOCK_SIZE + row) * KV_HEADS + kv_head) * HEAD_DIM
        mask = seen[:, None] & (half < HALF)[None, :]
        key_first = tl.load(key_ptr + at[:, None] + half[None, :], mask=mask, other=0.0)
        key_second = tl.load(key_ptr + at[:, None] + HALF + half[None, :], mask=mask, other=0.0)
        angle = tl.where(seen, position, 0)[:, None] * HALF + half[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        turned_first = (key_first.to(tl.float32) * cos - key_second.to(tl.float32) * sin).to(key_first.dtype)
        turned_second = (key_second.to(tl.float32) * cos + key_first.to(tl.float32) * sin).to(key_first.dtype)
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
        value_mask = seen[:, None] & (dim < HEAD_DIM)[None, :]
        value = tl.load(value_ptr + at[:, None] + dim[None, :], mask=value_mask, other=0.0)
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


@jit
def _merge_splits_kernel(
    partial_ptr, weight_ptr, out_ptr,
    HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
):  # fmt: skip
    # This program merges the parts of one head; `weight` is the base-2 log-sum-exp of each part.
    head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    weight = tl.load(weight_ptr + head * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    highest = tl.max(weight, axis=0)
    share = tl.exp2(weight - tl.where(highest == float("-inf"), 0.0, highest))
    mask = (split < SPLITS)[:, None] & (dim < HEAD_DIM)[None, :]
    partial = tl.load(partial_ptr + (head * SPLITS + split)[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
    total = tl.sum(share, axis=0)
    out = tl.sum(partial * share[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
