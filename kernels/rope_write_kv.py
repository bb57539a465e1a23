# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Put fresh keys and values into the pool un-rotated, and rotate queries (and keys, if asked) in place.

    key_pool[slot] = key,   value_pool[slot] = value,   query <- R(position) query,   R = half-split rotation

Source: RoFormer, arXiv 2104.09864, section 3.4.2. Keys are pooled before rotation, so a block can stand at any
position; a prefill that attends to its own fresh keys asks for them rotated as well.
Cost: reads and writes every element once; bandwidth bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.rotation import rotate_into


def rope_write_kv(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    *,
    rotate_keys: bool,
    rotated_keys: Tensor | None = None,
    plain_values: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Write `keys` and `values` into their slots, then rotate `queries` in place, and `keys` if `rotate_keys`.

    With `rotated_keys` and `plain_values` the rows are written there as well, for attention that reads them so.

    Args:
        queries: (tokens, q_heads, head_dim), rotated in place; heads contiguous, tokens at any stride.
        keys, values: (tokens, kv_heads, head_dim), strides as queries.
        positions: (tokens,) int64, below the rows of `cos`.
        slots: (tokens,) int64, distinct rows of the pool counted over blocks: block * block_size + row.
        cos, sin: (positions, head_dim / 2) fp32.
        key_pool, value_pool: (blocks, block_size, kv_heads, head_dim), contiguous.
        rotate_keys: whether `keys` leave rotated.
        rotated_keys, plain_values: (rows, kv_heads, head_dim), contiguous; a token's row is its position.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(queries, keys, values, positions, slots, cos, sin, key_pool, value_pool)
    _check_copies(key_pool, rotated_keys, plain_values)
    if resolve_backend(queries, backend) is Backend.TORCH:
        rope_write_kv_torch(
            queries, keys, values, positions, slots, cos, sin, key_pool, value_pool, rotate_keys=rotate_keys,
            rotated_keys=rotated_keys, plain_values=plain_values,
        )  # fmt: skip
        return
    tokens, q_heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    if tokens == 0:
        return
    _rope_write_kv_kernel[(tokens,)](
        queries, keys, values, positions, slots, cos, sin, key_pool, value_pool,
        key_pool if rotated_keys is None else rotated_keys, value_pool if plain_values is None else plain_values,
        queries.stride(0), keys.stride(0), values.stride(0),
        Q_HEADS=q_heads, Q_HEADS_PADDED=next_power_of_2(q_heads),
        KV_HEADS=kv_heads, KV_HEADS_PADDED=next_power_of_2(kv_heads),
        HALF=head_dim // 2, HALF_PADDED=next_power_of_2(head_dim // 2), ROTATE_KEYS=rotate_keys,
        COPY=rotated_keys is not None,
    )  # fmt: skip


def rope_write_kv_torch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    *,
    rotate_keys: bool,
    rotated_keys: Tensor | None = None,
    plain_values: Tensor | None = None,
) -> None:
    """Do what `rope_write_kv` does: the definition."""
    key_pool.flatten(0, 1)[slots] = keys
    value_pool.flatten(0, 1)[slots] = values
    cos, sin = cos[positions], sin[positions]
    if rotated_keys is not None and plain_values is not None:
        turned = torch.empty_like(keys)
        rotate_into(turned, keys, cos, sin)
        rotated_keys[positions], plain_values[positions] = turned.to(rotated_keys.dtype), values.to(plain_values.dtype)
    for heads in (queries, keys) if rotate_keys else (queries,):
        turned = torch.empty_like(heads)
        rotate_into(turned, heads, cos, sin)
        heads.copy_(turned)


def _check_inputs(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
) -> None:
    tokens, head_dim = queries.shape[0], queries.shape[-1]
    for name, heads in (("queries", queries), ("keys", keys), ("values", values)):
        if heads.dim() != 3 or heads.shape[0] != tokens or heads.shape[2] != head_dim:
            raise KernelInputError(f"{name} must be ({tokens}, heads, {head_dim}), got {tuple(heads.shape)}")
        if heads.numel() and heads.stride()[1:] != (head_dim, 1):
            raise KernelInputError(f"the heads of one token of {name} must be contiguous, got {heads.stride()}")
    if positions.shape != (tokens,) or slots.shape != (tokens,):
        raise KernelInputError(
            f"positions and slots must be ({tokens},), got {tuple(positions.shape)}, {tuple(slots.shape)}"
        )
    if cos.shape != sin.shape or cos.shape[-1] * 2 != head_dim or not (cos.is_contiguous() and sin.is_contiguous()):
        raise KernelInputError(f"cos and sin must be (positions, {head_dim // 2}), got {tuple(cos.shape)}")
    for pool in (key_pool, value_pool):
        if pool.dim() != 4 or pool.shape[2:] != keys.shape[1:] or not pool.is_contiguous():
            raise KernelInputError(
                f"pools must be (blocks, block_size, {keys.shape[1]}, {head_dim}), got {tuple(pool.shape)}"
            )


def _check_copies(key_pool: Tensor, rotated_keys: Tensor | None, plain_values: Tensor | None) -> None:
    if (rotated_keys is None) != (plain_values is None):
        raise KernelInputError("rotated_keys and plain_values are given together or not at all")
    for name, copy in (("rotated_keys", rotated_keys), ("plain_values", plain_values)):
        if copy is not None and (copy.dim() != 3 or copy.shape[1:] != key_pool.shape[2:] or not copy.is_contiguous()):
            raise KernelInputError(
                f"{name} must be (rows, {key_pool.shape[2]}, {key_pool.shape[3]}) contiguous, got {tuple(copy.shape)}"
            )


@launched
def _rope_write_kv_kernel(
    query_ptr, key_ptr, value_ptr, position_ptr, slot_ptr, cos_ptr, sin_ptr, key_pool_ptr, value_pool_ptr,
    key_copy_ptr, value_copy_ptr, stride_qt, stride_kt, stride_vt,
    Q_HEADS: tl.constexpr, Q_HEADS_PADDED: tl.constexpr, KV_HEADS: tl.constexpr, KV_HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, ROTATE_KEYS: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    # This program treats all heads of one token, as two halves of (heads, HALF) each.
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token)
    slot = tl.load(slot_ptr + token)
    column = tl.arange(0, HALF_PADDED)
    inside = column < HALF
    cos = tl.load(cos_ptr + position * HALF + column, mask=inside, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + column, mask=inside, other=0.0)[None, :]

    kv_head = tl.arange(0, KV_HEADS_PADDED)[:, None]
    kv_mask = (kv_head < KV_HEADS) & inside[None, :]
    kv_at = kv_head * (2 * HALF) + column[None, :]
    pool_at = slot * (KV_HEADS * 2 * HALF) + kv_at
    key_row = key_ptr + token * stride_kt + kv_at
    first = tl.load(key_row, mask=kv_mask)
    second = tl.load(key_row + HALF, mask=kv_mask)
    tl.store(key_pool_ptr + pool_at, first, mask=kv_mask)
    tl.store(key_pool_ptr + pool_at + HALF, second, mask=kv_mask)
    value_row = value_ptr + token * stride_vt + kv_at
    value_first, value_second = tl.load(value_row, mask=kv_mask), tl.load(value_row + HALF, mask=kv_mask)
    tl.store(value_pool_ptr + pool_at, value_first, mask=kv_mask)
    tl.store(value_pool_ptr + pool_at + HALF, value_second, mask=kv_mask)
    if ROTATE_KEYS or COPY:
        turned_first = (first.to(tl.float32) * cos - second.to(tl.float32) * sin).to(first.dtype)
        turned_second = (second.to(tl.float32) * cos + first.to(tl.float32) * sin).to(first.dtype)
        if ROTATE_KEYS:
            tl.store(key_row, turned_first, mask=kv_mask)
            tl.store(key_row + HALF, turned_second, mask=kv_mask)
        if COPY:
            copy_at = position * (KV_HEADS * 2 * HALF) + kv_at
            tl.store(key_copy_ptr + copy_at, turned_first, mask=kv_mask)
            tl.store(key_copy_ptr + copy_at + HALF, turned_second, mask=kv_mask)
            tl.store(value_copy_ptr + copy_at, value_first, mask=kv_mask)
            tl.store(value_copy_ptr + copy_at + HALF, value_second, mask=kv_mask)

    q_head = tl.arange(0, Q_HEADS_PADDED)[:, None]
    q_mask = (q_head < Q_HEADS) & inside[None, :]
    query_row = query_ptr + token * stride_qt + q_head * (2 * HALF) + column[None, :]
    left = tl.load(query_row, mask=q_mask)
    right = tl.load(query_row + HALF, mask=q_mask)
    turned = left.to(tl.float32) * cos - right.to(tl.float32) * sin
    tl.store(query_row, turned.to(left.dtype), mask=q_mask)
    turned = right.to(tl.float32) * cos + left.to(tl.float32) * sin
    tl.store(query_row + HALF, turned.to(left.dtype), mask=q_mask)
