# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Attention of a few drafted tokens a request over its KV blocks and over each other: one pass verifies them all.

    out_i = softmax_j(scale * q_i . k_j) v_j    over the rows before the drafted tokens, rotated while they are loaded,
                                                and over the drafted tokens that i descends from, itself included

The drafted tokens of a request are a chain or a tree. All of them see every row before them, so that the context needs
no mask but its end; among themselves bit j of `ancestors[i]` says whether i sees j. The queries of all of a request's
tokens that share a key head stand in one tile, so a row is read once for all of them, and a product of matrices that
one token would leave nearly empty serves up to 16 rows of queries for nothing. The rows of a request are split over
programs whose results are merged by their log-sum-exp.

Source: tree attention of SpecInfer, arXiv 2305.09781, section 4; FlashDecoding's split of keys; online softmax of
FlashAttention, arXiv 2205.14135, section 3.1; blocks of PagedAttention, arXiv 2309.06180.
Cost: reads keys and values once; bandwidth bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, next_power_of_2, num_processors, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.merge_splits import merge_splits
from ragkit.kernels.paged_rows import (
    FIELD_ROWS,
    Blocks,
    channels_of,
    check_paged_rows,
    load_near_angles,
    load_rotated_keys,
    load_values,
    parts_of,
    row_angles,
    stored_as,
    visible_rows_torch,
)

MOST_DRAFTED = 32  # tokens of a request that one pass verifies: the bits of a mask
_PAIRS = 16  # rows of queries that one product of matrices takes, whether they are there or not


class VerifyTile(NamedTuple):
    """How the work is cut.

    Attributes:
        pairs: (token, query head) pairs of one key head that a program attends with.
        rows: of the context, read at a time.
        warps: of a program.
        stages: of the pipeline that loads rows ahead.
        adds_angles: whether rows that stand behind each other turn by the sum of two angles, that of the first row and
            one that stays in registers, instead of loading as many bytes of angles as of keys and values.
    """

    pairs: int
    rows: int
    warps: int
    stages: int
    adds_angles: bool = False


def paged_verify_attention(
    queries: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    first_positions: Tensor,
    ancestors: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    bases: Tensor | None = None,
    key_field: Tensor | None = None,
    value_field: Tensor | None = None,
    scale: float,
    backend: Backend | None = None,
) -> Tensor:
    """Return (tokens, q_heads, head_dim) in the dtype of `queries`; zeros where a token sees no row.

    Args:
        queries: (tokens, q_heads, head_dim), rotated to each token's true position; equally many tokens a request, at
            most `MOST_DRAFTED`, behind each other; heads of a token contiguous.
        own_keys, own_values: (tokens, kv_heads, head_dim), those of the same tokens, keys rotated; as queries.
        key_pool, value_pool: (blocks, block_size, kv_heads, head_dim), contiguous, keys un-rotated; numbers, or codes.
        block_tables: (requests, max_entries) int32, blocks of each request; entries past `num_entries` are ignored.
        row_positions: (requests, max_entries, block_size) int32, true position of each row, or `HIDDEN`.
        num_entries: (requests,) int32.
        first_positions: (requests,) int64; of the blocks' rows those at lower positions are seen.
        ancestors: (tokens,) int32: bit j of token i's is set where it sees its request's token j.
        cos, sin: (positions, head_dim / 2) fp32; of angles that grow with the position evenly where `bases` is given.
        bases: (requests, max_entries) int32, what `entry_bases` gives; None looks up the angle of every row.
        key_field, value_field: (requests, max_entries, block_size / FIELD_ROWS, kv_heads, head_dim), contiguous, added
            to the rows of each entry, to keys before they are rotated.
        scale: factor on the scores.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_drafted(queries, own_keys, own_values, first_positions, ancestors)
    if bases is not None and (bases.shape != block_tables.shape or bases.dtype != torch.int32):
        raise KernelInputError(f"bases must be {tuple(block_tables.shape)} int32, got {tuple(bases.shape)}")
    check_paged_rows(
        queries, len(first_positions), key_pool, value_pool, block_tables, row_positions, num_entries, cos, sin,
        key_field, value_field,
    )  # fmt: skip
    if own_keys.shape[1] != key_pool.shape[2]:
        raise KernelInputError(f"own keys have {own_keys.shape[1]} heads, those of the pool {key_pool.shape[2]}")
    if resolve_backend(queries, backend) is Backend.TORCH:
        return paged_verify_attention_torch(
            queries, own_keys, own_values, key_pool, value_pool, block_tables, row_positions, num_entries,
            first_positions, ancestors, cos, sin, key_field=key_field, value_field=value_field, scale=scale,
        )  # fmt: skip
    return launch_paged_verify_attention(
        queries, own_keys, own_values, key_pool, value_pool, block_tables, row_positions, num_entries,
        first_positions, ancestors, cos, sin, bases=bases, key_field=key_field, value_field=value_field, scale=scale,
        tile=verify_tile(queries, len(first_positions), key_pool, value_pool),
    )  # fmt: skip


def launch_paged_verify_attention(
    queries: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    first_positions: Tensor,
    ancestors: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    bases: Tensor | None = None,
    key_field: Tensor | None = None,
    value_field: Tensor | None = None,
    scale: float,
    tile: VerifyTile,
) -> Tensor:
    """Return what `paged_verify_attention` returns, from inputs that it has checked, with the work cut by `tile`."""
    tokens, q_heads, head_dim = queries.shape
    out = torch.empty((tokens, q_heads, head_dim), dtype=queries.dtype, device=queries.device)
    if out.numel() == 0:
        return out
    requests, max_entries = block_tables.shape
    block_size, kv_heads = key_pool.shape[1:3]
    drafted, group = tokens // requests, q_heads // kv_heads
    tiles = ceil_div(drafted, tile.pairs // group)  # of the tokens of one request
    splits = num_splits(requests * tiles * kv_heads, max_entries, queries.device)
    partial = torch.empty((tokens, q_heads, splits, head_dim), dtype=torch.float32, device=queries.device)
    weights = torch.empty((tokens, q_heads, splits), dtype=torch.float32, device=queries.device)
    bits, key_group, channel_group = stored_as(key_pool, value_pool)
    _paged_verify_attention_kernel[(requests * tiles, kv_heads, splits)](
        queries, own_keys, own_values, *parts_of(key_pool), *parts_of(value_pool), block_tables, row_positions,
        num_entries, first_positions, ancestors, cos, sin, num_entries if bases is None else bases,
        queries if key_field is None else key_field, queries if value_field is None else value_field,
        partial, weights,
        scale * 1.4426950408889634,  # the kernel works with powers of two
        max_entries, drafted, tiles, queries.stride(0), own_keys.stride(0), own_values.stride(0),
        GROUP=group, PAIRS=tile.pairs, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        HALF_PADDED=max(16, next_power_of_2(head_dim // 2)), BLOCK_SIZE=block_size, FIELD_ROWS=FIELD_ROWS,
        ROWS=tile.rows, OWN_ROWS=max(16, next_power_of_2(drafted)), SPLITS=splits, BITS=bits, KEY_GROUP=key_group,
        CHANNEL_GROUP=channel_group, HAS_FIELD=key_field is not None,
        ADDS_ANGLES=tile.adds_angles and bases is not None,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not queries.is_cuda, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    merge_splits(partial, weights, out, backend=Backend.TRITON)
    return out


def paged_verify_attention_torch(
    queries: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    key_pool: Blocks,
    value_pool: Blocks,
    block_tables: Tensor,
    row_positions: Tensor,
    num_entries: Tensor,
    first_positions: Tensor,
    ancestors: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    key_field: Tensor | None = None,
    value_field: Tensor | None = None,
    scale: float,
) -> Tensor:
    """Return what `paged_verify_attention` returns: the definition, in fp32, one request after the other."""
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    requests, group = len(first_positions), queries.shape[1] // key_pool.shape[2]
    drafted = len(queries) // max(requests, 1)
    firsts = first_positions.tolist()
    sees = (ancestors.unsqueeze(1) >> torch.arange(drafted, device=queries.device)) & 1 > 0
    for index, count in enumerate(num_entries.tolist()):
        own = slice(index * drafted, (index + 1) * drafted)
        fields = [None if field is None else field[index, :count] for field in (key_field, value_field)]
        _, keys, values = visible_rows_torch(
            key_pool, value_pool, block_tables[index, :count], row_positions[index, :count], firsts[index] - 1,
            cos, sin, *fields,
        )  # fmt: skip
        mask = torch.cat((sees.new_ones(drafted, len(keys)), sees[own]), dim=1)
        keys, values = torch.cat((keys, own_keys[own].float())), torch.cat((values, own_values[own].float()))
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,rhd->hqr", queries[own].float(), keys) * scale
        shares = torch.nan_to_num(scores.masked_fill(~mask, float("-inf")).softmax(dim=-1), nan=0.0)
        out[own] = torch.einsum("hqr,rhd->qhd", shares, values).to(out.dtype)
    return out


def num_splits(programs: int, max_entries: int, device: torch.device) -> int:
    """Return into how many parts a request's blocks are split so that all of them fill the device.

    Args:
        programs: requests times tiles of tokens times key heads.
        max_entries: most blocks that one request may have; it bounds the splits.
        device: where the kernel runs.
    """
    if device.type != "cuda":
        return max(1, min(3, max_entries))  # interpreted: enough to have the merge tested
    return max(1, min(max_entries, 4 * num_processors(device) // programs, 128))


def verify_tile(queries: Tensor, requests: int, key_pool: Blocks, value_pool: Blocks) -> VerifyTile:
    """Return how the work is cut.

    A tile of keys and one of values, twice for loading ahead, must fit shared memory; what a program sums up for its
    queries must fit its registers. Rows of a tile share the scales of the keys.
    """
    drafted, (q_heads, head_dim) = len(queries) // max(requests, 1), queries.shape[1:]
    group = q_heads // key_pool.shape[2]
    is_large = head_dim * queries.element_size() > 256
    most = max(32 if is_large else 128, next_power_of_2(group))
    if queries.device.type != "cuda":
        most = max(16, next_power_of_2(group))  # interpreted: a few tokens have several tiles
    pairs = min(max(_PAIRS, next_power_of_2(drafted * group)), most)
    rows = min(32 if is_large else 64, stored_as(key_pool, value_pool)[1])
    return VerifyTile(pairs, rows, 4 if is_large or pairs <= 64 else 8, 2, adds_angles=not is_large)


def _check_drafted(
    queries: Tensor, own_keys: Tensor, own_values: Tensor, first_positions: Tensor, ancestors: Tensor
) -> None:
    tokens, requests = len(queries), len(first_positions)
    if first_positions.dim() != 1 or tokens % max(requests, 1) or tokens > requests * MOST_DRAFTED:
        raise KernelInputError(
            f"each of {requests} requests takes equally many tokens, at most {MOST_DRAFTED}, got {tokens} in all"
        )
    if ancestors.shape != (tokens,) or ancestors.dtype != torch.int32 or not ancestors.is_contiguous():
        raise KernelInputError(f"ancestors must be ({tokens},) int32, got {tuple(ancestors.shape)} {ancestors.dtype}")
    for heads in (own_keys, own_values):
        if heads.dim() != 3 or (heads.shape[0], heads.shape[2]) != (tokens, queries.shape[-1]):
            raise KernelInputError(
                f"own keys and values must be ({tokens}, kv_heads, {queries.shape[-1]}), got {tuple(heads.shape)}"
            )
        if heads.numel() and heads.stride()[1:] != (heads.shape[2], 1):
            raise KernelInputError(f"the heads of one token must be contiguous, got {heads.stride()}")


# The number of drafted tokens changes from step to step: no request waits for another compilation.
@launched(do_not_specialize=("drafted", "tiles"))
def _paged_verify_attention_kernel(
    query_ptr, own_key_ptr, own_value_ptr, key_ptr, key_scale_ptr, key_zero_ptr, value_ptr, value_scale_ptr,
    value_zero_ptr, table_ptr, row_position_ptr, num_entries_ptr, first_position_ptr, ancestor_ptr, cos_ptr, sin_ptr,
    base_ptr, key_field_ptr, value_field_ptr, partial_ptr, weight_ptr,
    scale_log2, max_entries, drafted, tiles, stride_qt, stride_kt, stride_vt,
    GROUP: tl.constexpr, PAIRS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, FIELD_ROWS: tl.constexpr, ROWS: tl.constexpr,
    OWN_ROWS: tl.constexpr, SPLITS: tl.constexpr, BITS: tl.constexpr, KEY_GROUP: tl.constexpr,
    CHANNEL_GROUP: tl.constexpr, HAS_FIELD: tl.constexpr, ADDS_ANGLES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program attends with the query heads of one key head of some tokens of one request to one part of the
    # request's blocks; the program of the last part also to the tokens themselves.
    HALF: tl.constexpr = HEAD_DIM // 2
    NUMBER: tl.constexpr = query_ptr.dtype.element_ty
    request, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, split = tl.program_id(1), tl.program_id(2)
    entries = tl.load(num_entries_ptr + request)
    first_position = tl.load(first_position_ptr + request)
    part = (entries + SPLITS - 1) // SPLITS

    pair = tl.arange(0, PAIRS)
    own_token = tile * (PAIRS // GROUP) + pair // GROUP  # among the request's
    head = kv_head * GROUP + pair % GROUP
    is_pair = (pair < PAIRS // GROUP * GROUP) & (own_token < drafted)
    first_token = request.to(tl.int64) * drafted
    token = first_token + own_token
    half = tl.arange(0, HALF_PADDED)
    is_half = half < HALF
    query_at = query_ptr + (token * stride_qt + head * HEAD_DIM)[:, None] + half[None, :]
    query_mask = is_pair[:, None] & is_half[None, :]
    query_first = tl.load(query_at, mask=query_mask, other=0.0)
    query_second = tl.load(query_at + HALF, mask=query_mask, other=0.0)
    if UPCAST:
        query_first, query_second = query_first.to(tl.float32), query_second.to(tl.float32)

    near_cos, near_sin = load_near_angles(cos_ptr, sin_ptr, half, ROWS, HALF, ADDS_ANGLES)
    highest = tl.full((PAIRS,), float("-inf"), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    summed = tl.zeros((PAIRS, 2 * HALF_PADDED), tl.float32)
    first_of_request = request * max_entries  # 32 bits: 64 cost a fifth of the registers
    first_entry = split * part
    last_entry = tl.minimum(first_entry + part, entries)
    for step in range(first_entry * (BLOCK_SIZE // ROWS), last_entry * (BLOCK_SIZE // ROWS)):
        entry = first_of_request + step // (BLOCK_SIZE // ROWS)
        first_row = (step % (BLOCK_SIZE // ROWS)) * ROWS
        row = first_row + tl.arange(0, ROWS)
        block = tl.load(table_ptr + entry).to(tl.int64)
        position = tl.load(row_position_ptr + entry * BLOCK_SIZE + row)
        seen = position < first_position
        row_at = (block * BLOCK_SIZE + row) * KV_HEADS + kv_head
        group_at = (block * (BLOCK_SIZE // KEY_GROUP) + first_row // KEY_GROUP) * KV_HEADS + kv_head
        field_at = (entry.to(tl.int64) * (BLOCK_SIZE // FIELD_ROWS) + row // FIELD_ROWS) * KV_HEADS + kv_head
        cos, sin = row_angles(
            cos_ptr, sin_ptr, base_ptr + entry, first_row, first_position, position, seen, near_cos, near_sin, half,
            HALF, ADDS_ANGLES,
        )  # fmt: skip
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
        scores = tl.where(seen[None, :], scores * scale_log2, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # While nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        exponent = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(exponent, axis=1)
        summed = tl.dot(exponent.to(value.dtype), value, acc=summed * shrink[:, None], input_precision="ieee")
        highest = new_highest

    channel, is_channel = channels_of(tl.arange(0, 2 * HALF_PADDED), HALF, HALF_PADDED)
    if split == SPLITS - 1:
        own = tl.arange(0, OWN_ROWS)
        is_own = own < drafted
        key_at = own_key_ptr + ((first_token + own) * stride_kt + kv_head * HEAD_DIM)[:, None] + half[None, :]
        own_mask = is_own[:, None] & is_half[None, :]
        key_first = tl.load(key_at, mask=own_mask, other=0.0)
        key_second = tl.load(key_at + HALF, mask=own_mask, other=0.0)
        value_at = own_value_ptr + ((first_token + own) * stride_vt + kv_head * HEAD_DIM)[:, None] + channel[None, :]
        value = tl.load(value_at, mask=is_own[:, None] & is_channel[None, :], other=0.0)
        if UPCAST:
            key_first, key_second = key_first.to(tl.float32), key_second.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(query_first, tl.trans(key_first), input_precision="ieee")
        scores = tl.dot(query_second, tl.trans(key_second), acc=scores, input_precision="ieee")
        ancestor = tl.load(ancestor_ptr + token, mask=is_pair, other=0)
        sees = ((ancestor[:, None] >> own[None, :]) & 1) > 0
        scores = tl.where(sees & is_own[None, :], scores * scale_log2, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        exponent = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(exponent, axis=1)
        summed = tl.dot(exponent.to(value.dtype), value, acc=summed * shrink[:, None], input_precision="ieee")
        highest = new_highest

    out_at = (token * (KV_HEADS * GROUP) + head) * SPLITS + split
    safe = tl.where(total > 0, total, 1.0)
    tl.store(weight_ptr + out_at, tl.where(total > 0, highest + tl.log2(safe), float("-inf")), mask=is_pair)
    out_mask = is_pair[:, None] & is_channel[None, :]
    tl.store(partial_ptr + out_at[:, None] * HEAD_DIM + channel[None, :], summed / safe[:, None], mask=out_mask)
