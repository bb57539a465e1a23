# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Attention of scattered query rows over all rows up to their own: what recomputes a few tokens of a long prompt.

    out_i = softmax_j(scale * q_i . k_j) v_j   over the rows j <= p_i

Causal by true position: a query in the middle of the prompt sees nothing behind itself, however few queries there are.
A program takes some neighbouring queries with all heads that share a key head, as one tall tile, so that every key is
read once for all of them. Keys that all of the tile's queries see need no mask; only those among its positions do.

Source: FlashAttention-2, arXiv 2307.08691, section 3.1; positions instead of a triangle: this project.
Cost: 4 * head_dim operations a head and visible (query, row) pair; compute bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import (
    Backend,
    ceil_div,
    jit,
    next_power_of_2,
    num_processors,
    resolve_backend,
    tiles_of_rows,
    tl,
)
from ragkit.kernels.launched import launched
from ragkit.kernels.merge_splits import merge_splits
from ragkit.kernels.row_scores import padded_rows, row_scores

_CPU_QUERY_BLOCK = 64  # queries at once on a CPU: fewer multiply too slowly, more waste work on what is masked
_MERGED_TILES = 8  # as many tiles of keys take as long as a part of a program's sums
_LOG2_E = 1.4426950408889634  # the kernel works with powers of two


class AttentionTile(NamedTuple):
    """How the work is cut.

    Attributes:
        pairs: queries times heads that one program holds.
        rows: keys that it multiplies at once.
        warps, stages: of the program; `stages` tiles of keys are loaded ahead.
    """

    pairs: int
    rows: int
    warps: int
    stages: int


def selected_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scale: float,
    seen_by_all: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Return (tokens, q_heads, head_dim), contiguous, in the dtype of `queries`.

    Args:
        queries: (tokens, q_heads, head_dim), rotated; heads of a token contiguous, tokens at any stride.
        keys, values: (rows, kv_heads, head_dim), contiguous, keys rotated; row j stands at position j.
        positions: (tokens,) int32, ascending, below `rows`. On a GPU the caller answers for that: to look would stop
            the stream.
        scale: factor on the scores, above zero.
        seen_by_all: rows that every query sees, as far as is known on the host: how the work is cut follows from it.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit, or positions on the CPU are not ascending rows.
    """
    _check_inputs(queries, keys, values, positions, scale)
    if resolve_backend(queries, backend) is Backend.TORCH:
        return selected_attention_torch(queries, keys, values, positions, scale=scale)
    tile = attention_tile(queries.shape[2], queries.dtype, queries.device)
    return launch_selected_attention(
        queries, keys, values, positions, scale=scale, tile=tile, seen_by_all=seen_by_all
    )  # fmt: skip


def selected_attention_torch(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, scale: float
) -> Tensor:
    """Return what `selected_attention` returns, in the inputs' type: the definition, and what runs on a CPU."""
    if queries.dtype == torch.bfloat16 and queries.device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return _wide_scores(queries, keys, values, positions, scale)
    tokens, q_heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    out = torch.empty((tokens, q_heads, head_dim), dtype=queries.dtype, device=queries.device)
    # (kv_heads, heads that share a key head, tokens, head_dim): keys are shared by stride, never copied.
    grouped = queries.unflatten(1, (kv_heads, q_heads // kv_heads)).permute(1, 2, 0, 3)
    result = out.unflatten(1, (kv_heads, q_heads // kv_heads)).permute(1, 2, 0, 3)
    stored, content = (
        part.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1) for part in (keys, values)
    )
    row = torch.arange(len(keys), device=positions.device, dtype=positions.dtype)
    for start in range(0, tokens, _CPU_QUERY_BLOCK):
        block = slice(start, start + _CPU_QUERY_BLOCK)
        reach = int(positions[block][-1]) + 1  # nothing behind the block's last query is seen by any of its queries
        result[:, :, block] = functional.scaled_dot_product_attention(
            grouped[:, :, block], stored[:, :, :reach], content[:, :, :reach],
            attn_mask=row[:reach] <= positions[block].unsqueeze(1), scale=scale,
        )  # fmt: skip
    return out


def _wide_scores(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Return the same in bf16, scores in fp32: without AMX this takes less than half of the time of torch's SDPA."""
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if len(queries) == 0:
        return out
    group = queries.shape[1] // keys.shape[1]
    written = int(positions[-1]) + 1
    stored = _head_after_head(keys[:written], torch.float32)
    content = _head_after_head(values[:written], values.dtype)
    row = torch.arange(stored.shape[1], dtype=positions.dtype)
    for start in range(0, queries.shape[0], _CPU_QUERY_BLOCK):
        block = slice(start, start + _CPU_QUERY_BLOCK)
        at = positions[block]
        # Rows that all of the block's queries see, and a few more than any does.
        seen, reach = int(at[0]) + 1, padded_rows(int(at[-1]) + 1)
        later = torch.zeros(len(at), 1, reach - seen)
        later.masked_fill_((row[seen:reach] > at.unsqueeze(1)).unsqueeze(1), float("-inf"))
        for kv_head in range(keys.shape[1]):  # one after the other: the scores stay in the cache
            heads = slice(kv_head * group, (kv_head + 1) * group)
            part = queries[block, heads].float().mul_(scale).flatten(0, 1)
            scores = row_scores(part, stored[kv_head, :reach])
            scores.view(len(at), group, reach)[..., seen:].add_(later)
            shares = torch.softmax(scores, dim=-1, out=scores).to(values.dtype)
            out[block, heads] = (shares @ content[kv_head, :reach]).view(len(at), group, -1)
    return out


def _head_after_head(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (heads, padded rows, head_dim), zeros behind the rows."""
    written, heads, head_dim = rows.shape
    copy = torch.empty((heads, padded_rows(written), head_dim), dtype=dtype)
    copy[:, :written], copy[:, written:] = rows.transpose(0, 1), 0
    return copy


def attention_tile(head_dim: int, dtype: torch.dtype, device: torch.device) -> AttentionTile:
    """Return how the work is cut: as large as registers and shared memory allow on the device."""
    if device.type != "cuda":
        return AttentionTile(32, 32, 4, 1)  # interpreted: small inputs have several tiles
    if dtype == torch.float32:
        return AttentionTile(64, 16, 8, 2)
    return AttentionTile(128, 128 if head_dim <= 128 else 64, 8, 3 if head_dim <= 128 else 2)


def num_key_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Return into how many parts each query's keys are split, so that few queries fill the device as well.

    Args:
        programs: how many there would be without.
        tiles: of keys, of the query that sees most.
        device: where the kernel runs.
    """
    processors = num_processors(device) if device.type == "cuda" else 4
    if programs >= 2 * processors:
        return 1
    return max(1, min(ceil_div(2 * processors, programs), tiles // 4, 32))


def even_key_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Return the same where every query sees about as many rows, so that programs take equally long.

    A multiprocessor has room for one program of the tile that is taken, so programs run in rounds. A part leaves sums
    in fp32, which are written, read and merged: on an H100 about as long as `_MERGED_TILES` tiles of keys take.
    """
    processors = num_processors(device) if device.type == "cuda" else 4

    def spent(splits: int) -> int:
        return ceil_div(programs * splits, processors) * (ceil_div(tiles, splits) + _MERGED_TILES * (splits > 1))

    return min(range(1, max(1, min(tiles // 4, 32)) + 1), key=spent)


def launch_selected_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    scale: float,
    tile: AttentionTile,
    seen_by_all: int = 0,
) -> Tensor:
    """Return what `selected_attention` returns, from the kernel, cut as `tile` says; nothing is checked."""
    tokens, q_heads, head_dim = queries.shape
    rows, kv_heads = keys.shape[:2]
    out = torch.empty((tokens, q_heads, head_dim), dtype=queries.dtype, device=queries.device)
    if out.numel() == 0:
        return out
    group = q_heads // kv_heads
    pairs = max(tile.pairs, next_power_of_2(group))
    programs = ceil_div(tokens, pairs // group) * kv_heads
    choose_splits = even_key_splits if 2 * seen_by_all > rows else num_key_splits
    splits = choose_splits(programs, ceil_div(rows, tile.rows), queries.device)
    partial, weights = out, out
    if splits > 1:
        partial = torch.empty((tokens, q_heads, splits, head_dim), dtype=torch.float32, device=queries.device)
        weights = torch.empty((tokens, q_heads, splits), dtype=torch.float32, device=queries.device)
    dim_padded = max(16, next_power_of_2(head_dim))
    _selected_attention_kernel[(programs * splits,)](
        queries, tiles_of_rows(keys, tile.rows, dim_padded), tiles_of_rows(values, tile.rows, dim_padded),
        positions, partial, weights, scale * _LOG2_E, tokens, splits, queries.stride(0),
        GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM_PADDED=dim_padded, PAIRS=pairs, ROWS=tile.rows,
        STAGES=tile.stages, WHOLE=splits == 1,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not queries.is_cuda, num_warps=tile.warps,
    )  # fmt: skip
    if splits > 1:
        merge_splits(partial, weights, out, backend=Backend.TRITON)
    return out


def _check_inputs(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> None:
    if queries.dim() != 3 or (queries.numel() and queries.stride()[1:] != (queries.shape[2], 1)):
        raise KernelInputError(f"queries must be (tokens, heads, head_dim), got {tuple(queries.shape)}")
    tokens, q_heads, head_dim = queries.shape
    if keys.dim() != 3 or keys.shape != values.shape or keys.shape[2] != head_dim:
        raise KernelInputError(
            f"keys and values must be (rows, kv_heads, {head_dim}) alike, "
            f"got {tuple(keys.shape)}, {tuple(values.shape)}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise KernelInputError("keys and values must be contiguous")
    if any(place % 16 for place in (head_dim * keys.element_size(), keys.data_ptr(), values.data_ptr())):
        raise KernelInputError("every head of keys and values must start at a multiple of 16 bytes in memory")
    if not queries.dtype == keys.dtype == values.dtype:
        raise KernelInputError(
            f"queries, keys and values must share a type: {queries.dtype}, {keys.dtype}, {values.dtype}"
        )
    if keys.shape[1] == 0 or q_heads % keys.shape[1]:
        raise KernelInputError(f"{q_heads} query heads cannot share {keys.shape[1]} key heads")
    if not scale > 0:
        raise KernelInputError(f"scale must be above zero, got {scale}")
    if positions.shape != (tokens,) or positions.dtype != torch.int32 or not positions.is_contiguous():
        raise KernelInputError(f"positions must be ({tokens},) int32, got {tuple(positions.shape)} {positions.dtype}")
    if tokens and positions.device.type == "cpu":
        ascending = bool((positions.diff() > 0).all())
        if not ascending or not 0 <= int(positions[0]) <= int(positions[-1]) < len(keys):
            raise KernelInputError(f"positions must be ascending rows below {len(keys)}: sort them, each once")


# Sizes that differ from call to call are not specialised: no request waits for another compilation.
@launched(do_not_specialize=("tokens", "splits"))
def _selected_attention_kernel(
    query_ptr, keys, values, position_ptr, out_ptr, weight_ptr, scale_log2, tokens, splits, stride_qt,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program attends with the query heads of one key head of some neighbouring tokens to one part of their rows.
    # The tokens that see most come first: work that starts late must be short.
    TOKENS: tl.constexpr = PAIRS // GROUP
    program = tl.program_id(0)
    split, kv_head = program % splits, program // splits % KV_HEADS
    tile = (tl.num_programs(0) - 1 - program) // (splits * KV_HEADS)

    pair = tl.arange(0, PAIRS)
    token = (tile * TOKENS + pair // GROUP).to(tl.int64)
    head = kv_head * GROUP + pair % GROUP
    is_pair = (pair < TOKENS * GROUP) & (token < tokens)
    dim = tl.arange(0, DIM_PADDED)
    mask = is_pair[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(query_ptr + (token * stride_qt + head * HEAD_DIM)[:, None] + dim[None, :], mask=mask, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    position = tl.load(position_ptr + token, mask=is_pair, other=-1)
    last = tl.max(position, axis=0)
    position = tl.where(is_pair, position, last)

    highest = tl.full((PAIRS,), float("-inf"), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    summed = tl.zeros((PAIRS, DIM_PADDED), tl.float32)
    steps = last // ROWS + 1
    part = (steps + splits - 1) // splits
    start, stop = split * part, tl.minimum(split * part + part, steps)
    free = tl.minimum(tl.maximum((tl.min(position, axis=0) + 1) // ROWS, start), stop)
    # First the keys that every query sees, then those that only the later ones do.
    highest, total, summed = _attend(
        query, highest, total, summed, keys, values, kv_head, position, last, start, free, scale_log2,
        DIM_PADDED, ROWS, False, STAGES, UPCAST,
    )  # fmt: skip
    highest, total, summed = _attend(
        query, highest, total, summed, keys, values, kv_head, position, last, free, stop, scale_log2,
        DIM_PADDED, ROWS, True, 1, UPCAST,
    )  # fmt: skip

    safe = tl.where(total > 0, total, 1.0)
    at = (token * (KV_HEADS * GROUP) + head) * splits + split
    out = (summed / safe[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * HEAD_DIM + dim[None, :], out, mask=mask)
    if not WHOLE:
        tl.store(weight_ptr + at, tl.where(total > 0, highest + tl.log2(safe), float("-inf")), mask=is_pair)


@jit
def _attend(
    query, highest, total, summed, keys, values, kv_head, position, last, first_step, last_step, scale_log2,
    DIM_PADDED: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        row = step * ROWS + tl.arange(0, ROWS)
        key = keys.load([step * ROWS, kv_head, 0]).reshape(ROWS, DIM_PADDED)
        value = values.load([step * ROWS, kv_head, 0]).reshape(ROWS, DIM_PADDED)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if MASKED:
            scores = tl.where(row[None, :] <= position[:, None], scores, float("-inf"))
            value = tl.where((row <= last)[:, None], value, 0.0)  # rows not written yet may hold NaN
        new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2)
        base = new_highest
        if MASKED:
            # While nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        exponent = tl.exp2(scores * scale_log2 - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(exponent, axis=1)
        summed = tl.dot(exponent.to(value.dtype), value, acc=summed * shrink[:, None], input_precision="ieee")
        highest = new_highest
    return highest, total, summed
