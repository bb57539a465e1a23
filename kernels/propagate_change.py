# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Blend cached KV rows with recomputed ones, moving the rows between by the smoothed change of those recomputed.

    row_t = cached_t + strength * min(1, S_t) * sum_j v_j w_tj (fresh_j - cached_j) / sum_j v_j w_tj,   row_j = fresh_j
    over the recomputed rows j of t's chunk (see propagation_plan for v, w and S)

Keys are those before rotation; keys and values have their own strengths. A row that no recomputed one is near to keeps
its cached numbers exactly, and so does a chunk without any. Rows go to their slots in the pool and, where asked,
once more behind each other with the keys rotated, for attention that reads them so.

Source: this project's own method (change propagation); rotation: RoFormer, arXiv 2104.09864, section 3.4.2.
Cost: reads cached rows once and writes each result once, or twice; bandwidth bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.propagation_plan import TILE_ROWS, PropagationPlan, strengths_alike
from ragkit.kernels.rotation import rotate_into


def propagate_change(
    cached_keys: Tensor,
    cached_values: Tensor,
    fresh_keys: Tensor,
    fresh_values: Tensor,
    plan: PropagationPlan,
    slots: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    *,
    key_strength: float | Tensor,
    value_strength: float | Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    first_position: int = 0,
    rotated_keys: Tensor | None = None,
    plain_values: Tensor | None = None,
    places: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Write the blended rows of one layer into their slots, and rotated behind each other if `rotated_keys` is given.

    Args:
        cached_keys, cached_values: (rows, kv_heads, head_dim), all chunks behind each other, keys un-rotated; heads of
            a row contiguous, rows at any stride.
        fresh_keys, fresh_values: (n, kv_heads, head_dim), the recomputed rows in the order of the plan, strides alike.
        plan: what `plan_propagation` gave for the request.
        slots: (rows,) int64, distinct rows of the pool counted over blocks: block * block_size + row.
        key_pool, value_pool: (blocks, block_size, kv_heads, head_dim), contiguous.
        key_strength, value_strength: a number, or (kv_heads,) fp32.
        cos, sin: (positions, head_dim / 2) fp32; needed with `rotated_keys`.
        first_position: position of row 0.
        rotated_keys, plain_values: (positions, kv_heads, head_dim), contiguous; row r goes to first_position + r.
        places: (rows,) int64, where each row is among the cached ones, which are then any number, those of a pool for
            one; without it they are the rows themselves. A row may lie in its own slot, and in no other row's.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    strengths = (key_strength, value_strength)
    _check_rows(
        cached_keys, cached_values, fresh_keys, fresh_values, plan, slots, key_pool, value_pool, strengths, places
    )
    _check_copies(key_pool, plan.rows, cos, sin, first_position, rotated_keys, plain_values)
    if resolve_backend(cached_keys, backend) is Backend.TORCH:
        propagate_change_torch(
            cached_keys, cached_values, fresh_keys, fresh_values, plan, slots, key_pool, value_pool,
            key_strength=key_strength, value_strength=value_strength, cos=cos, sin=sin,
            first_position=first_position, rotated_keys=rotated_keys, plain_values=plain_values, places=places,
        )  # fmt: skip
        return
    kv_heads, head_dim = cached_keys.shape[1:]
    if cached_keys.numel() == 0:
        return
    half = head_dim // 2
    alike, by_head = strengths_alike(key_strength, value_strength, cached_keys)
    copies = (key_pool, value_pool) if rotated_keys is None or plain_values is None else (rotated_keys, plain_values)
    _propagate_change_kernel[(len(plan.tiles), kv_heads, 2)](
        cached_keys, cached_values, fresh_keys, fresh_values, plan.selected if places is None else places,
        plan.selected, plan.voices, plan.shares, plan.entry_of_row, plan.tiles, slots,
        *(by_head or (plan.shares, plan.shares)), plan.shares if cos is None else cos,
        plan.shares if sin is None else sin, key_pool, value_pool, *copies,
        cached_keys.stride(0), cached_values.stride(0), fresh_keys.stride(0), fresh_values.stride(0), *alike,
        -0.5 * 1.4426950408889634 / plan.sigma**2,  # the kernel works with powers of two
        plan.reach, first_position,
        KV_HEADS=kv_heads, HALF=half, HALF_PADDED=max(16, next_power_of_2(half)), ROWS=TILE_ROWS, ENTRIES=32,
        BY_HEAD=by_head is not None, COPY=rotated_keys is not None, HAS_PLACES=places is not None,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not cached_keys.is_cuda, num_warps=8, num_stages=2,
    )  # fmt: skip


def propagate_change_torch(
    cached_keys: Tensor,
    cached_values: Tensor,
    fresh_keys: Tensor,
    fresh_values: Tensor,
    plan: PropagationPlan,
    slots: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    *,
    key_strength: float | Tensor,
    value_strength: float | Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    first_position: int = 0,
    rotated_keys: Tensor | None = None,
    plain_values: Tensor | None = None,
    places: Tensor | None = None,
) -> None:
    """Do what `propagate_change` does: the definition, in fp32."""
    if places is not None:
        cached_keys, cached_values = cached_keys[places], cached_values[places]
    keys = _blended(cached_keys, fresh_keys, plan, key_strength).to(key_pool.dtype)
    key_pool.flatten(0, 1).index_copy_(0, slots, keys)
    values = _blended(cached_values, fresh_values, plan, value_strength).to(value_pool.dtype)
    value_pool.flatten(0, 1).index_copy_(0, slots, values)
    if rotated_keys is not None and plain_values is not None and cos is not None and sin is not None:
        there = slice(first_position, first_position + plan.rows)
        plain_values[there] = values
        rotate_into(rotated_keys[there], keys, cos[there], sin[there])


def _blended(cached: Tensor, fresh: Tensor, plan: PropagationPlan, strength: float | Tensor) -> Tensor:
    """Return (rows, heads, head_dim) fp32."""
    change = fresh.float() - cached.index_select(0, plan.selected).float()
    change *= strength if isinstance(strength, float | int) else strength[:, None]
    change = change.flatten(1)
    rows = cached.float().flatten(1)
    blended = torch.empty_like(rows)
    for block in plan.blocks:
        if block.weights.shape[1]:
            torch.addmm(rows[block.rows], block.weights, change[block.entries], out=blended[block.rows])
        else:
            blended[block.rows] = rows[block.rows]
    return blended.view(cached.shape).index_copy_(0, plan.selected, fresh.float())


def _check_rows(
    cached_keys: Tensor,
    cached_values: Tensor,
    fresh_keys: Tensor,
    fresh_values: Tensor,
    plan: PropagationPlan,
    slots: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    strengths: tuple[float | Tensor, float | Tensor],
    places: Tensor | None,
) -> None:
    if cached_keys.dim() != 3 or cached_keys.shape[2] % 2:
        raise KernelInputError(
            f"cached_keys must be (rows, kv_heads, an even head_dim), got {tuple(cached_keys.shape)}"
        )
    kv_heads, head_dim = cached_keys.shape[1:]
    if places is not None and (places.shape != (plan.rows,) or not places.is_contiguous()):
        raise KernelInputError(f"places must be ({plan.rows},), got {tuple(places.shape)}")
    cached_rows = plan.rows if places is None else len(cached_keys)
    for name, heads, rows in (
        ("cached_keys", cached_keys, cached_rows),
        ("cached_values", cached_values, cached_rows),
        ("fresh_keys", fresh_keys, len(plan.selected)),
        ("fresh_values", fresh_values, len(plan.selected)),
    ):
        if heads.shape != (rows, kv_heads, head_dim):
            raise KernelInputError(f"{name} must be {(rows, kv_heads, head_dim)}, got {tuple(heads.shape)}")
        if heads.numel() and heads.stride()[1:] != (head_dim, 1):
            raise KernelInputError(f"the heads of one row of {name} must be contiguous, got strides {heads.stride()}")
    if cached_keys.dtype != fresh_keys.dtype or cached_values.dtype != fresh_values.dtype:
        raise KernelInputError(
            f"cached and fresh rows must share a type, got {cached_keys.dtype}, {fresh_keys.dtype} of keys and "
            f"{cached_values.dtype}, {fresh_values.dtype} of values"
        )
    if slots.shape != (plan.rows,) or not slots.is_contiguous():
        raise KernelInputError(f"slots must be ({plan.rows},), got {tuple(slots.shape)}")
    for pool in (key_pool, value_pool):
        if pool.dim() != 4 or pool.shape[2:] != (kv_heads, head_dim) or not pool.is_contiguous():
            raise KernelInputError(
                f"pools must be (blocks, block_size, {kv_heads}, {head_dim}) contiguous, got {tuple(pool.shape)}"
            )
    for strength in strengths:
        if isinstance(strength, Tensor) and (strength.shape != (kv_heads,) or strength.dtype != torch.float32):
            raise KernelInputError(f"a strength must be a number or ({kv_heads},) fp32, got {tuple(strength.shape)}")


def _check_copies(
    key_pool: Tensor,
    rows: int,
    cos: Tensor | None,
    sin: Tensor | None,
    first_position: int,
    rotated_keys: Tensor | None,
    plain_values: Tensor | None,
) -> None:
    if rotated_keys is None and plain_values is None:
        return
    if rotated_keys is None or plain_values is None or cos is None or sin is None:
        raise KernelInputError("rotated_keys needs plain_values, cos and sin, and plain_values needs rotated_keys")
    kv_heads, head_dim = key_pool.shape[2:]
    end = first_position + rows
    for name, copy in (("rotated_keys", rotated_keys), ("plain_values", plain_values)):
        fits = copy.dim() == 3 and copy.shape[1:] == (kv_heads, head_dim) and len(copy) >= end
        if not fits or not copy.is_contiguous() or copy.dtype != key_pool.dtype:
            raise KernelInputError(
                f"{name} must be ({end} or more, {kv_heads}, {head_dim}) contiguous {key_pool.dtype}, "
                f"got {tuple(copy.shape)} {copy.dtype}"
            )
    for table in (cos, sin):
        if table.dim() != 2 or table.shape[1] * 2 != head_dim or len(table) < end or not table.is_contiguous():
            raise KernelInputError(
                f"cos and sin must be ({end} or more, {head_dim // 2}) contiguous, got {tuple(table.shape)}"
            )


@launched(do_not_specialize=("first_position",))  # no request waits for another compilation
def _propagate_change_kernel(
    cached_key_ptr, cached_value_ptr, fresh_key_ptr, fresh_value_ptr, place_ptr, selected_ptr, voice_ptr, share_ptr,
    entry_ptr, tile_ptr, slot_ptr, key_strength_ptr, value_strength_ptr, cos_ptr, sin_ptr, key_pool_ptr,
    value_pool_ptr, key_copy_ptr, value_copy_ptr,
    stride_ck, stride_cv, stride_fk, stride_fv, key_strength, value_strength, exponent, reach, first_position,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
    BY_HEAD: tl.constexpr, COPY: tl.constexpr, HAS_PLACES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # This program blends keys or values of one tile for one head, as two halves of HALF channels each.
    tile, head, is_value = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cached_ptr = cached_value_ptr if is_value else cached_key_ptr
    fresh_ptr = fresh_value_ptr if is_value else fresh_key_ptr
    pool_ptr = value_pool_ptr if is_value else key_pool_ptr
    copy_ptr = value_copy_ptr if is_value else key_copy_ptr
    stride_cr = stride_cv if is_value else stride_ck
    stride_fr = stride_fv if is_value else stride_fk
    end_row = tl.load(tile_ptr + tile * 4 + 1)
    first_entry, end_entry = tl.load(tile_ptr + tile * 4 + 2), tl.load(tile_ptr + tile * 4 + 3)
    row = tl.load(tile_ptr + tile * 4) + tl.arange(0, ROWS)
    is_row = row < end_row
    column = tl.arange(0, HALF_PADDED)[None, :]
    channel = head * (2 * HALF) + column
    mask = is_row[:, None] & (column < HALF)
    # What is known by row is asked for before the loop, so that the way to memory is spent on the weights.
    place = row.to(tl.int64)
    if HAS_PLACES:
        place = tl.load(place_ptr + row, mask=is_row, other=0)
    cached_at = cached_ptr + place[:, None] * stride_cr + channel
    first, second = tl.load(cached_at, mask=mask, other=0.0), tl.load(cached_at + HALF, mask=mask, other=0.0)
    slot = tl.load(slot_ptr + row, mask=is_row, other=0)
    own = tl.load(entry_ptr + row, mask=is_row, other=-1)
    fresh_at = fresh_ptr + own.to(tl.int64)[:, None] * stride_fr + channel
    is_fresh = (own >= 0)[:, None]
    first = tl.where(is_fresh, tl.load(fresh_at, mask=mask & is_fresh, other=0.0), first)
    second = tl.where(is_fresh, tl.load(fresh_at + HALF, mask=mask & is_fresh, other=0.0), second)

    moved_first = tl.zeros((ROWS, HALF_PADDED), tl.float32)
    moved_second = tl.zeros((ROWS, HALF_PADDED), tl.float32)
    for start in range(first_entry, end_entry, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        is_entry = entry < end_entry
        chosen = tl.load(selected_ptr + entry, mask=is_entry, other=0)
        distance = row[:, None] - chosen.to(tl.int32)[None, :]
        near = (tl.abs(distance) <= reach) & is_entry[None, :]
        step = distance.to(tl.float32)
        voice = tl.load(voice_ptr + entry, mask=is_entry, other=0.0)
        weight = tl.where(near, tl.exp2(step * step * exponent + voice[None, :]), 0.0)
        in_entry = is_entry[:, None] & (column < HALF)
        source = chosen
        if HAS_PLACES:
            source = tl.load(place_ptr + chosen, mask=is_entry, other=0)
        was_at = cached_ptr + source[:, None] * stride_cr + channel
        is_at = fresh_ptr + entry.to(tl.int64)[:, None] * stride_fr + channel
        was, now = tl.load(was_at, mask=in_entry, other=0.0), tl.load(is_at, mask=in_entry, other=0.0)
        change_first = (now.to(tl.float32) - was.to(tl.float32)).to(now.dtype)
        was, now = tl.load(was_at + HALF, mask=in_entry, other=0.0), tl.load(is_at + HALF, mask=in_entry, other=0.0)
        change_second = (now.to(tl.float32) - was.to(tl.float32)).to(now.dtype)
        weight = weight.to(now.dtype)
        if UPCAST:
            weight, change_first = weight.to(tl.float32), change_first.to(tl.float32)
            change_second = change_second.to(tl.float32)
        moved_first = tl.dot(weight, change_first, acc=moved_first, input_precision="ieee")
        moved_second = tl.dot(weight, change_second, acc=moved_second, input_precision="ieee")

    strength = value_strength if is_value else key_strength
    if BY_HEAD:
        strength = tl.load((value_strength_ptr if is_value else key_strength_ptr) + head)
    share = (strength * tl.load(share_ptr + row, mask=is_row, other=0.0))[:, None]
    out_type = pool_ptr.dtype.element_ty
    first = (first.to(tl.float32) + share * moved_first).to(out_type)
    second = (second.to(tl.float32) + share * moved_second).to(out_type)
    pool_at = pool_ptr + slot[:, None] * (KV_HEADS * 2 * HALF) + channel
    tl.store(pool_at, first, mask=mask)
    tl.store(pool_at + HALF, second, mask=mask)
    if COPY:
        position = (first_position + row).to(tl.int64)[:, None]
        copy_at = copy_ptr + position * (KV_HEADS * 2 * HALF) + channel
        if is_value == 0:
            cos = tl.load(cos_ptr + position * HALF + column, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + position * HALF + column, mask=mask, other=0.0)
            left, right = first.to(tl.float32), second.to(tl.float32)
            first, second = (left * cos - right * sin).to(out_type), (right * cos + left * sin).to(out_type)
        tl.store(copy_at, first, mask=mask)
        tl.store(copy_at + HALF, second, mask=mask)
