# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Attention of a question over the rows before it, and how much of it each row receives.

    p_ij = softmax_j(scale * q_i . R(j) k_j)  over the rows j <= i's position
    out_i = sum_j p_ij v_j,   mass_j = sum_i p_ij over the question's tokens and heads

Keys lie un-rotated, row j at position j. The matrix p is never stored: rows are split over programs whose results are
merged by their log-sum-exp, and a second pass over the keys alone sums exp(score - log-sum-exp) for each row.

Source: choosing tokens by the question's attention: FusionRAG, arXiv 2601.12904; online softmax: FlashAttention, arXiv
2205.14135, section 3.1; split of the rows: FlashDecoding.
Cost: reads keys twice and values once; bandwidth bound while tokens * q_heads / kv_heads is at most about 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, jit, next_power_of_2, num_processors, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.merge_splits import merge_splits
from ragkit.kernels.rotation import rotate_into
from ragkit.kernels.row_scores import row_scores

_TORCH_SCORES = 1 << 24  # scores that the torch definition holds at a time: 64 MB


def question_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    first_position: int,
    scale: float,
    with_mass: bool = True,
    places: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(out, mass)`: (tokens, q_heads, head_dim) in the dtype of `queries`, and (rows,) fp32.

    Results are the same bits in every run. `mass` sums to tokens * q_heads; rows after the question receive nothing.

    Args:
        queries: (tokens, q_heads, head_dim), already rotated, token i at `first_position` + i; heads contiguous.
        keys, values: (rows, kv_heads, head_dim), contiguous, keys un-rotated; the question's own rows are among them.
        cos, sin: (positions, head_dim / 2) fp32.
        first_position: position of the first query.
        scale: factor on the scores.
        with_mass: without it `mass` is empty and the second pass is saved.
        places: (rows,) int64, where each row is among the keys and values, which are then any number, those of a pool
            for one; without it they are the rows themselves.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(queries, keys, values, cos, sin, first_position, places)
    if resolve_backend(queries, backend) is Backend.TORCH:
        return question_attention_torch(
            queries, keys, values, cos, sin,
            first_position=first_position, scale=scale, with_mass=with_mass, places=places,
        )  # fmt: skip
    scale *= 1.4426950408889634  # the kernels work with powers of two
    out, log_sums = _attend(queries, keys, values, cos, sin, first_position, scale, places)
    if not with_mass:
        return out, log_sums.new_empty(0)
    return out, _row_mass(queries, keys, cos, sin, log_sums, first_position, scale, places)


def question_attention_torch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    first_position: int,
    scale: float,
    with_mass: bool = True,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `question_attention` returns: the definition, head after head, some tokens at a time.

    Scores are fp32; as in the kernel the shares meet the values in the values' type.
    """
    if places is not None:
        keys, values = keys[places], values[places]
    tokens, q_heads, head_dim = queries.shape
    rows, kv_heads, _ = keys.shape
    end, group = first_position + tokens, q_heads // kv_heads
    mass = torch.zeros(rows if with_mass else 0, device=queries.device)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    turned = torch.empty((end, 1, head_dim), device=queries.device)
    at_once = max(1, _TORCH_SCORES // max(1, group * end))
    for head in range(kv_heads):
        rotate_into(turned, keys[:end, head : head + 1], cos[:end], sin[:end])
        plain, heads = values[:end, head].contiguous(), slice(head * group, (head + 1) * group)
        for start in range(0, tokens, at_once):
            part = queries[start : start + at_once, heads].float() * scale
            count, seen = len(part), first_position + start + len(part)
            scores = row_scores(part.flatten(0, 1), turned[:seen, 0])
            # Only the last `count` rows are hidden from some of these queries.
            hidden = torch.ones(count, count, dtype=torch.bool, device=queries.device).triu(1).unsqueeze(1)
            scores.unflatten(0, (count, group))[..., seen - count :].masked_fill_(hidden, float("-inf"))
            weights = torch.softmax(scores, dim=-1, out=scores)
            if with_mass:
                mass[:seen] += weights.sum(dim=0)
            out[start : start + count, heads] = (weights.to(values.dtype) @ plain[:seen]).unflatten(0, (count, group))
    return out, mass


def num_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Return into how many parts the rows are split so that the programs fill the device about twice.

    Args:
        programs: programs of one part.
        tiles: tiles of rows there are to split.
        device: where the kernel runs.
    """
    if device.type != "cuda":
        return max(1, min(3, tiles))  # interpreted: enough to have the merge tested
    processors = num_processors(device)
    return max(1, min(tiles, ceil_div(2 * processors, programs), 128))


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    first_position: int,
    scale_log2: float,
    places: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output, and (tokens, q_heads) fp32: the base-2 logarithm of each query's sum of exponents."""
    tokens, q_heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    log_sums = torch.empty((tokens, q_heads), dtype=torch.float32, device=queries.device)
    if out.numel() == 0:
        return out, log_sums
    end, packed = first_position + tokens, tokens * (q_heads // kv_heads)
    in_tile, rows = _tile_sizes(packed, keys)
    query_tiles = ceil_div(packed, in_tile)
    splits = num_splits(query_tiles * kv_heads, ceil_div(end, rows), queries.device)
    partial = torch.empty((tokens, q_heads, splits, head_dim), dtype=torch.float32, device=queries.device)
    weights = torch.empty((tokens, q_heads, splits), dtype=torch.float32, device=queries.device)
    _attend_part_kernel[(query_tiles, kv_heads, splits)](
        queries, keys, values, queries if places is None else places, cos, sin, partial, weights,
        scale_log2, packed, first_position, end, splits, queries.stride(0),
        GROUP=q_heads // kv_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        DIM_PADDED=max(16, next_power_of_2(head_dim)), HALF_PADDED=max(16, next_power_of_2(head_dim // 2)),
        QUERIES=in_tile, ROWS=rows, HAS_PLACES=places is not None,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not queries.is_cuda, num_warps=8 if in_tile >= 128 else 4, num_stages=_stages(queries.device),
    )  # fmt: skip
    merge_splits(partial, weights, out, log_sums, backend=Backend.TRITON)
    return out, log_sums


def _row_mass(
    queries: Tensor,
    keys: Tensor,
    cos: Tensor,
    sin: Tensor,
    log_sums: Tensor,
    first_position: int,
    scale_log2: float,
    places: Tensor | None,
) -> Tensor:
    tokens, q_heads, head_dim = queries.shape
    rows, kv_heads = len(keys if places is None else places), keys.shape[1]
    is_whole = rows == first_position + tokens  # then the kernel writes every row
    make = torch.empty if is_whole and tokens * q_heads else torch.zeros
    mass = make(rows, dtype=torch.float32, device=queries.device)
    if tokens * q_heads == 0:
        return mass
    packed = tokens * (q_heads // kv_heads)
    in_tile, tile_rows = _mass_tile_sizes(packed, keys)
    _row_mass_kernel[(ceil_div(first_position + tokens, tile_rows),)](
        queries, keys, queries if places is None else places, cos, sin, log_sums, mass,
        scale_log2, packed, first_position, first_position + tokens, queries.stride(0),
        GROUP=q_heads // kv_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        HALF_PADDED=max(16, next_power_of_2(head_dim // 2)), QUERIES=in_tile, ROWS=tile_rows,
        HAS_PLACES=places is not None, UPCAST=not queries.is_cuda, num_warps=8, num_stages=2,
    )  # fmt: skip
    return mass


def _tile_sizes(packed: int, keys: Tensor) -> tuple[int, int]:
    """Return how many queries and how many rows a program holds so that tiles of both fit shared memory."""
    row_bytes = max(16, next_power_of_2(keys.shape[2])) * keys.element_size()
    if keys.is_cuda and row_bytes <= 256 and packed > 128:
        return 256, 32  # a key is rotated once for all queries; measured on an H100 for heads of 128
    queries = max(16, min(128, 32768 // row_bytes, next_power_of_2(packed)))
    return queries, max(16, min(64, 16384 // row_bytes))


def _mass_tile_sizes(packed: int, keys: Tensor) -> tuple[int, int]:
    """Return the same for the sums by row, which hold no output."""
    row_bytes = max(16, next_power_of_2(keys.shape[2])) * keys.element_size()
    if keys.is_cuda and row_bytes <= 256:
        return max(16, min(128, next_power_of_2(packed))), 128
    queries, rows = _tile_sizes(packed, keys)
    return min(queries, rows), rows


def _stages(device: torch.device) -> int:
    """Return how many tiles of keys and values are under way at a time: 64 KB each, as many as there is room for."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return {(8, 0): 2, (9, 0): 3, (10, 0): 3}.get(capability, 1)  # A100, H100 and B200 have 163 and 227 KB


def _check_inputs(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    first_position: int,
    places: Tensor | None,
) -> None:
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
    if keys.shape[1] == 0 or q_heads % keys.shape[1]:
        raise KernelInputError(f"{q_heads} query heads cannot share {keys.shape[1]} key heads")
    if places is not None and (places.dim() != 1 or not places.is_contiguous()):
        raise KernelInputError(f"places must be (rows,), got {tuple(places.shape)}")
    end, rows = first_position + tokens, len(keys if places is None else places)
    if first_position < 0 or rows < end:
        raise KernelInputError(
            f"the question stands at {first_position} to {end}, so {end} rows are needed, got {rows}"
        )
    for table in (cos, sin):
        if table.dim() != 2 or table.shape[1] * 2 != head_dim or len(table) < end or not table.is_contiguous():
            raise KernelInputError(
                f"cos and sin must be ({end} or more, {head_dim // 2}) contiguous, got {tuple(table.shape)}"
            )


@jit
def _turned_keys(key_ptr, cos, sin, place, mask, half, kv_head, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    # Both halves (ROWS, HALF_PADDED) of one head's keys, rotated by `cos` and `sin` of the same shape.
    at = key_ptr + (place[:, None] * KV_HEADS + kv_head) * HEAD_DIM + half[None, :]
    first = tl.load(at, mask=mask, other=0.0)
    second = tl.load(at + HEAD_DIM // 2, mask=mask, other=0.0)
    left, right = first.to(tl.float32), second.to(tl.float32)
    return (left * cos - right * sin).to(first.dtype), (right * cos + left * sin).to(first.dtype)


# Sizes that differ from question to question are not specialised: no question waits for another compilation.
@launched(do_not_specialize=("packed", "first_position", "end", "splits"))
def _attend_part_kernel(
    query_ptr, key_ptr, value_ptr, place_ptr, cos_ptr, sin_ptr, partial_ptr, weight_ptr,
    scale_log2, packed, first_position, end, splits, stride_qt,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, HAS_PLACES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # This program attends with QUERIES queries (heads within tokens) of one key head over one part of the rows.
    query_tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = HEAD_DIM // 2
    query = query_tile * QUERIES + tl.arange(0, QUERIES)
    is_query = query < packed
    token, head = query // GROUP, kv_head * GROUP + query % GROUP
    position = first_position + token
    half = tl.arange(0, HALF_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    query_at = query_ptr + token.to(tl.int64)[:, None] * stride_qt + head[:, None] * HEAD_DIM + half[None, :]
    query_mask = is_query[:, None] & (half < HALF)[None, :]
    query_first = tl.load(query_at, mask=query_mask, other=0.0)
    query_second = tl.load(query_at + HALF, mask=query_mask, other=0.0)
    if UPCAST:
        query_first, query_second = query_first.to(tl.float32), query_second.to(tl.float32)

    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    summed = tl.zeros((QUERIES, DIM_PADDED), tl.float32)
    part = (end + ROWS * splits - 1) // (ROWS * splits) * ROWS
    for start in range(split * part, tl.minimum(split * part + part, end), ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < end
        place = row.to(tl.int64)
        if HAS_PLACES:
            place = tl.load(place_ptr + row, mask=is_row, other=0)
        mask = is_row[:, None] & (half < HALF)[None, :]
        angle = row[:, None] * HALF + half[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        key_first, key_second = _turned_keys(key_ptr, cos, sin, place, mask, half, kv_head, KV_HEADS, HEAD_DIM)
        if UPCAST:
            key_first, key_second = key_first.to(tl.float32), key_second.to(tl.float32)
        scores = tl.dot(query_first, tl.trans(key_first), input_precision="ieee")
        scores = tl.dot(query_second, tl.trans(key_second), acc=scores, input_precision="ieee")
        scores = tl.where(row[None, :] <= position[:, None], scores * scale_log2, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # While nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - base)
        exponent = tl.exp2(scores - base[:, None])
        value_at = value_ptr + (place[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
        value = tl.load(value_at, mask=is_row[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        total = total * shrink + tl.sum(exponent, axis=1)
        summed = tl.dot(exponent.to(value.dtype), value, acc=summed * shrink[:, None], input_precision="ieee")
        highest = new_highest

    out_at = (token.to(tl.int64) * (KV_HEADS * GROUP) + head) * splits + split
    safe = tl.where(total > 0, total, 1.0)
    tl.store(weight_ptr + out_at, tl.where(total > 0, highest + tl.log2(safe), float("-inf")), mask=is_query)
    out_mask = is_query[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(partial_ptr + out_at[:, None] * HEAD_DIM + dim[None, :], summed / safe[:, None], mask=out_mask)


@launched(do_not_specialize=("packed", "first_position", "end"))
def _row_mass_kernel(
    query_ptr, key_ptr, place_ptr, cos_ptr, sin_ptr, log_sum_ptr, mass_ptr,
    scale_log2, packed, first_position, end, stride_qt,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, HAS_PLACES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program sums the weights that ROWS rows receive from all queries, head after head.
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < end
    place = row.to(tl.int64)
    if HAS_PLACES:
        place = tl.load(place_ptr + row, mask=is_row, other=0)
    half = tl.arange(0, HALF_PADDED)
    mask = is_row[:, None] & (half < HALF)[None, :]
    angle = row[:, None] * HALF + half[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    mass = tl.zeros((ROWS,), tl.float32)
    query_tiles = (packed + QUERIES - 1) // QUERIES
    # One loop and not one within another: so the loads of the next head run ahead of the products of this one.
    for step in range(KV_HEADS * query_tiles):
        kv_head = step // query_tiles
        query = (step % query_tiles) * QUERIES + tl.arange(0, QUERIES)
        is_query = query < packed
        token, head = query // GROUP, kv_head * GROUP + query % GROUP
        query_at = query_ptr + token.to(tl.int64)[:, None] * stride_qt + head[:, None] * HEAD_DIM + half[None, :]
        query_mask = is_query[:, None] & (half < HALF)[None, :]
        query_first = tl.load(query_at, mask=query_mask, other=0.0)
        query_second = tl.load(query_at + HALF, mask=query_mask, other=0.0)
        key_first, key_second = _turned_keys(key_ptr, cos, sin, place, mask, half, kv_head, KV_HEADS, HEAD_DIM)
        if UPCAST:
            query_first, query_second = query_first.to(tl.float32), query_second.to(tl.float32)
            key_first, key_second = key_first.to(tl.float32), key_second.to(tl.float32)
        scores = tl.dot(key_first, tl.trans(query_first), input_precision="ieee")
        scores = tl.dot(key_second, tl.trans(query_second), acc=scores, input_precision="ieee")
        log_sum = tl.load(log_sum_ptr + token * (KV_HEADS * GROUP) + head, mask=is_query, other=float("inf"))
        seen = row[:, None] <= (first_position + token)[None, :]
        exponent = tl.exp2(scores * scale_log2 - log_sum[None, :])
        mass += tl.sum(tl.where(seen, exponent, 0.0), axis=1)
    tl.store(mass_ptr + row, mass, mask=is_row)
