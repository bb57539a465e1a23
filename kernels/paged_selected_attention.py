# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Attention of scattered query rows of several requests over their KV blocks, rotating keys while it loads them.

    out_i = softmax_j(scale * q_i . R(p_j) k_j) v_j   over the rows j of i's request with p_j <= p_i

Causal by true position, as `selected_attention`, over un-rotated keys in blocks that requests share, as
`paged_decode_attention`: a row at `HIDDEN` is seen by no query. A request's blocks are read in the order of their
smallest position, so that a tile of queries stops at the first block that lies behind all of them.

Source: FlashAttention-2, arXiv 2307.08691, section 3.1; blocks of PagedAttention, arXiv 2309.06180.
Cost: 4 * head_dim operations a head and visible (query, row) pair, and one rotation of each key a tile of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.merge_splits import merge_splits
from ragkit.kernels.paged_rows import (
    FIELD_ROWS,
    HIDDEN,
    Blocks,
    channels_of,
    check_paged_rows,
    load_angles,
    load_rotated_keys,
    load_values,
    parts_of,
    stored_as,
    visible_rows_torch,
)
from ragkit.kernels.selected_attention import AttentionTile, num_key_splits

_LOG2_E = 1.4426950408889634  # the kernel works with powers of two


def paged_selected_attention(
    queries: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    positions: Tensor,
    cu_queries: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    key_field: Tensor | None = None,
    value_field: Tensor | None = None,
    order: tuple[Tensor, Tensor] | None = None,
    scale: float,
    backend: Backend | None = None,
) -> Tensor:
    """Return (tokens, q_heads, head_dim) in the dtype of `queries`; zeros where a query sees no row.

    Args:
        queries: (tokens, q_heads, head_dim), the requests' behind each other, rotated; heads of a token contiguous.
        key_pool, value_pool: (blocks, block_size, kv_heads, head_dim), contiguous, keys un-rotated; numbers, or codes.
        block_tables: (requests, max_entries) int32, blocks of each request; entries past `num_entries` are ignored.
        row_positions: (requests, max_entries, block_size) int32, true position of each row, or `HIDDEN`.
        num_entries: (requests,) int32.
        positions: (tokens,) int32, positions of the queries; ascending within a request for speed.
        cu_queries: (requests + 1,) int32: request i has the queries from `cu_queries[i]` up to `cu_queries[i + 1]`.
        cos, sin: (positions, head_dim / 2) fp32.
        key_field, value_field: (requests, max_entries, block_size / FIELD_ROWS, kv_heads, head_dim), contiguous, added
            to the rows of each entry, to keys before they are rotated.
        order: what `ordered_entries` gives for these tables, the same for all layers; None finds it anew.
        scale: factor on the scores.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    requests = _check_queries(queries, positions, cu_queries)
    check_paged_rows(
        queries, requests, key_pool, value_pool, block_tables, row_positions, num_entries, cos, sin,
        key_field, value_field,
    )  # fmt: skip
    if order is not None and any(part.shape != block_tables.shape or not part.is_contiguous() for part in order):
        raise KernelInputError(f"order must be two of {tuple(block_tables.shape)}, contiguous")
    if resolve_backend(queries, backend) is Backend.TORCH:
        return paged_selected_attention_torch(
            queries, key_pool, value_pool, block_tables, row_positions, num_entries, positions, cu_queries, cos, sin,
            key_field=key_field, value_field=value_field, scale=scale,
        )  # fmt: skip
    tokens, q_heads, head_dim = queries.shape
    out = torch.empty((tokens, q_heads, head_dim), dtype=queries.dtype, device=queries.device)
    if out.numel() == 0:
        return out
    block_size, kv_heads = key_pool.shape[1:3]
    max_entries, group = block_tables.shape[1], q_heads // kv_heads
    tile = paged_tile(head_dim, queries.dtype, queries.device, has_field=key_field is not None)
    pairs = max(tile.pairs, next_power_of_2(group))
    # As many tiles as the queries can take however they are spread: how they are is known on the device alone.
    programs = (tokens // (pairs // group) + requests) * kv_heads
    splits = num_key_splits(programs, max_entries, queries.device)
    partial, weights = out, out
    if splits > 1:
        partial = torch.empty((tokens, q_heads, splits, head_dim), dtype=torch.float32, device=queries.device)
        weights = torch.empty((tokens, q_heads, splits), dtype=torch.float32, device=queries.device)
    bits, key_group, channel_group = stored_as(key_pool, value_pool)
    lowest, entries = ordered_entries(row_positions, num_entries) if order is None else order
    _paged_selected_attention_kernel[(programs * splits,)](
        queries, *parts_of(key_pool), *parts_of(value_pool), block_tables, row_positions, lowest, entries, positions,
        cu_queries, cos, sin,
        queries if key_field is None else key_field, queries if value_field is None else value_field,
        partial, weights, scale * _LOG2_E, requests, max_entries, splits, queries.stride(0),
        GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        HALF_PADDED=max(16, next_power_of_2(head_dim // 2)), BLOCK_SIZE=block_size, FIELD_ROWS=FIELD_ROWS,
        PAIRS=pairs, ROWS=min(key_group, tile.rows), REQUESTS_PADDED=next_power_of_2(requests),
        STAGES=tile.stages, BITS=bits, KEY_GROUP=key_group, CHANNEL_GROUP=channel_group,
        HAS_FIELD=key_field is not None, WHOLE=splits == 1,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not queries.is_cuda, num_warps=tile.warps,
    )  # fmt: skip
    if splits > 1:
        merge_splits(partial, weights, out, backend=Backend.TRITON)
    return out


def paged_selected_attention_torch(
    queries: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    positions: Tensor,
    cu_queries: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    key_field: Tensor | None = None,
    value_field: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Return what `paged_selected_attention` returns: the definition, in fp32, one request after the other."""
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    group = queries.shape[1] // key_pool.shape[2]
    bounds = cu_queries.tolist()
    for index, count in enumerate(num_entries.tolist()):
        own = slice(bounds[index], bounds[index + 1])
        at = positions[own]
        if at.numel() == 0:
            continue
        fields = [None if field is None else field[index, :count] for field in (key_field, value_field)]
        row_at, keys, values = visible_rows_torch(
            key_pool, value_pool, block_tables[index, :count], row_positions[index, :count], int(at.max()), cos, sin,
            *fields,
        )  # fmt: skip
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,rhd->hqr", queries[own].float(), keys) * scale
        scores.masked_fill_(row_at > at.unsqueeze(1), float("-inf"))
        shares = torch.nan_to_num(scores.softmax(dim=-1), nan=0.0)  # a query that sees nothing
        out[own] = torch.einsum("hqr,rhd->qhd", shares, values).to(out.dtype)
    return out


def paged_tile(head_dim: int, dtype: torch.dtype, device: torch.device, *, has_field: bool) -> AttentionTile:
    """Return how the work is cut: tiles of keys, values, angles and a field must fit shared memory together."""
    if device.type != "cuda":
        return AttentionTile(32, 32, 4, 1)  # interpreted: small inputs have several tiles, and blocks several parts
    if dtype == torch.float32:
        return AttentionTile(32, 16, 4, 1)
    if head_dim > 128:
        return AttentionTile(128, 32, 8, 1 if has_field else 2)
    return AttentionTile(128, 64, 8, 2)


def ordered_entries(row_positions: Tensor, num_entries: Tensor) -> tuple[Tensor, Tensor]:
    """Return each request's smallest positions of its entries, ascending, and which entries those are.

    Both are (requests, max_entries) int32, and of one request for all layers.

    Args:
        row_positions, num_entries: as `paged_selected_attention` takes them.
    """
    lowest = row_positions.amin(dim=-1)
    entry = torch.arange(lowest.shape[1], device=lowest.device)
    lowest.masked_fill_(entry >= num_entries.unsqueeze(1), HIDDEN)
    lowest, order = lowest.sort(dim=1)
    return lowest, order.int()


def _check_queries(queries: Tensor, positions: Tensor, cu_queries: Tensor) -> int:
    if cu_queries.dim() != 1 or len(cu_queries) < 2 or cu_queries.dtype != torch.int32:
        raise KernelInputError(
            f"cu_queries must be (requests + 1,) int32, got {tuple(cu_queries.shape)} {cu_queries.dtype}"
        )
    tokens = queries.shape[0]
    if positions.shape != (tokens,) or positions.dtype != torch.int32 or not positions.is_contiguous():
        raise KernelInputError(f"positions must be ({tokens},) int32, got {tuple(positions.shape)} {positions.dtype}")
    if cu_queries.device.type == "cpu":
        rises = bool((cu_queries.diff() >= 0).all())
        if not rises or (int(cu_queries[0]), int(cu_queries[-1])) != (0, tokens):
            raise KernelInputError(f"cu_queries must rise from 0 to {tokens}, got {cu_queries.tolist()}")
    return len(cu_queries) - 1


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("requests", "max_entries", "splits"))
def _paged_selected_attention_kernel(
    query_ptr, key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr, value_zero_ptr,
    table_ptr, row_position_ptr, lowest_ptr, order_ptr, position_ptr, cu_query_ptr, cos_ptr, sin_ptr,
    key_field_ptr, value_field_ptr, out_ptr, weight_ptr,
    scale_log2, requests, max_entries, splits, stride_qt,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FIELD_ROWS: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    REQUESTS_PADDED: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, KEY_GROUP: tl.constexpr,
    CHANNEL_GROUP: tl.constexpr, HAS_FIELD: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program attends with the query heads of one key head of some neighbouring tokens of one request to one part
    # of the blocks that they see. The last tokens come first: work that starts late must be short.
    HALF: tl.constexpr = HEAD_DIM // 2
    TOKENS: tl.constexpr = PAIRS // GROUP
    FIELDS: tl.constexpr = BLOCK_SIZE // FIELD_ROWS
    NUMBER: tl.constexpr = query_ptr.dtype.element_ty
    program = tl.program_id(0)
    split, kv_head = program % splits, program // splits % KV_HEADS
    index = tl.arange(0, REQUESTS_PADDED)
    first = tl.load(cu_query_ptr + index, mask=index < requests, other=0)
    end = tl.load(cu_query_ptr + index + 1, mask=index < requests, other=0)
    ends = tl.cumsum((end - first + TOKENS - 1) // TOKENS, axis=0)  # tiles of the requests up to each
    tile = tl.max(ends, axis=0) - 1 - program // (splits * KV_HEADS)
    if tile < 0:
        return
    request = tl.sum((ends <= tile).to(tl.int32), axis=0)
    tile -= tl.max(tl.where(index < request, ends, 0), axis=0)
    first, end = (
        tl.max(tl.where(index == request, first, 0), axis=0),
        tl.max(tl.where(index == request, end, 0), axis=0),
    )

    pair = tl.arange(0, PAIRS)
    token = (first + tile * TOKENS + pair // GROUP).to(tl.int64)
    head = kv_head * GROUP + pair % GROUP
    is_pair = (pair < TOKENS * GROUP) & (token < end)
    half = tl.arange(0, HALF_PADDED)
    query_at = query_ptr + (token * stride_qt + head * HEAD_DIM)[:, None] + half[None, :]
    query_mask = is_pair[:, None] & (half < HALF)[None, :]
    query_first = tl.load(query_at, mask=query_mask, other=0.0)
    query_second = tl.load(query_at + HALF, mask=query_mask, other=0.0)
    if UPCAST:
        query_first, query_second = query_first.to(tl.float32), query_second.to(tl.float32)
    query_position = tl.load(position_ptr + token, mask=is_pair, other=-1)
    last = tl.max(query_position, axis=0)

    base_entry = request * max_entries
    entries = 0  # blocks with a row that one of the queries sees
    for start in range(0, max_entries, 64):
        at = start + tl.arange(0, 64)
        lowest = tl.load(lowest_ptr + base_entry + at, mask=at < max_entries, other=2147483647)
        entries += tl.sum((lowest <= last).to(tl.int32), axis=0)
    part = (entries + splits - 1) // splits
    first_step = split * part * (BLOCK_SIZE // ROWS)
    last_step = tl.minimum(split * part + part, entries) * (BLOCK_SIZE // ROWS)

    highest = tl.full((PAIRS,), float("-inf"), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    summed = tl.zeros((PAIRS, 2 * HALF_PADDED), tl.float32)
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        entry = base_entry + tl.load(order_ptr + base_entry + step // (BLOCK_SIZE // ROWS))
        first_row = (step % (BLOCK_SIZE // ROWS)) * ROWS
        row = first_row + tl.arange(0, ROWS)
        position = tl.load(row_position_ptr + entry * BLOCK_SIZE + row)
        block = tl.load(table_ptr + entry).to(tl.int64)
        row_at = (block * BLOCK_SIZE + row) * KV_HEADS + kv_head
        group_at = (block * (BLOCK_SIZE // KEY_GROUP) + first_row // KEY_GROUP) * KV_HEADS + kv_head
        field_at = (entry.to(tl.int64) * FIELDS + row // FIELD_ROWS) * KV_HEADS + kv_head
        seen = position <= last
        cos, sin = load_angles(cos_ptr, sin_ptr, position, seen, half, HALF)
        key_first, key_second = load_rotated_keys(
            key_ptr, key_scale_ptr, key_zero_ptr, key_field_ptr, row_at, group_at, field_at, cos, sin, seen, half,
            HALF, BITS, HAS_FIELD, NUMBER,
        )  # fmt: skip
        value = load_values(
            value_ptr, value_scale_ptr, value_zero_ptr, value_field_ptr, row_at, field_at, seen,
            HALF, HALF_PADDED, BITS, CHANNEL_GROUP, HAS_FIELD, NUMBER,
        )  # fmt: skip
        if UPCAST:
            key_first, key_second = key_first.to(tl.float32), key_second.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(query_first, tl.trans(key_first), input_precision="ieee")
        scores = tl.dot(query_second, tl.trans(key_second), acc=scores, input_precision="ieee")
        scores = tl.where(position[None, :] <= query_position[:, None], scores * scale_log2, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # While nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        exponent = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(exponent, axis=1)
        summed = tl.dot(exponent.to(value.dtype), value, acc=summed * shrink[:, None], input_precision="ieee")
        highest = new_highest

    safe = tl.where(total > 0, total, 1.0)
    out_at = (token * (KV_HEADS * GROUP) + head) * splits + split
    channel, is_channel = channels_of(tl.arange(0, 2 * HALF_PADDED), HALF, HALF_PADDED)
    out_mask = is_pair[:, None] & is_channel[None, :]
    out = (summed / safe[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at[:, None] * HEAD_DIM + channel[None, :], out, mask=out_mask)
    if not WHOLE:
        tl.store(weight_ptr + out_at, tl.where(total > 0, highest + tl.log2(safe), float("-inf")), mask=is_pair)
