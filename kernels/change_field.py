# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""The change of rows that stay as they are, averaged over cells of `FIELD_ROWS` rows: what attention adds to them.

    field_c = mean over the rows t of cell c that were not recomputed of
              strength * min(1, S_t) * sum_j v_j w_tj (fresh_j - cached_j) / sum_j v_j w_tj      (see propagation_plan)

`propagate_change` writes the change of every row into a private copy of it. Here rows stay where they are, for every
request that uses them, and what a request knows better about them is a coarse field beside: one vector for 16 rows,
which `paged_rows` adds while it loads them. A cell never holds rows of two chunks, because a chunk begins with a block.
A cell that no recomputed row is near to is zero, and so is one of which all rows were recomputed.

Source: this project's own method (change propagation).
Cost: reads the recomputed rows a few times, mostly from the cache, and writes a sixteenth of the rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, ceil_div, next_power_of_2, resolve_backend, tl
from ragkit.kernels.host_copy import to_device
from ragkit.kernels.launched import launched
from ragkit.kernels.paged_rows import FIELD_ROWS
from ragkit.kernels.propagation_plan import TILE_ROWS, PropagationPlan, strengths_alike

_Block = tuple[slice, slice, Tensor]  # cells, entries of the recomputed rows, and (cells, entries) fp32 weights


class ChunkCells:
    """Where the cells of one request's chunks lie in its block table: each chunk takes whole blocks, one after another.

    Args:
        cu_rows: chunk c owns the rows from `cu_rows[c]` up to `cu_rows[c + 1]`, as `ChunkTiles` takes it.
        block_size: rows of a block, a multiple of `FIELD_ROWS`.
        device: where plans with these cells lie.

    Attributes:
        cu_rows: as above.
        num_cells: cells of all of the chunks' blocks.
        of_tiles: (tiles,) int32 on the device: the cell that each tile of a plan begins with.

    Raises:
        KernelInputError: a block cannot be cut into cells.
    """

    def __init__(self, cu_rows: Sequence[int], block_size: int, device: torch.device) -> None:
        if block_size < FIELD_ROWS or block_size % FIELD_ROWS:
            raise KernelInputError(f"blocks must hold a multiple of {FIELD_ROWS} rows, got {block_size}")
        self.cu_rows = tuple(cu_rows)
        lengths = [stop - start for start, stop in pairwise(self.cu_rows)]
        blocks = accumulate((ceil_div(length, block_size) for length in lengths), initial=0)
        self._firsts = [count * (block_size // FIELD_ROWS) for count in blocks]
        self.num_cells = self._firsts[-1]
        of_tiles = [
            first + np.arange(0, length, TILE_ROWS) // FIELD_ROWS
            for first, length in zip(self._firsts, lengths, strict=False)
        ]
        cells = np.concatenate([np.empty(0, dtype=np.int64), *of_tiles]).astype(np.int32)
        self.of_tiles = to_device(torch.from_numpy(cells), device)

    def at(self, row: int) -> int:
        """Return the cell of a row, which is the first of its cell."""
        chunk = bisect_right(self.cu_rows, row) - 1  # of empty chunks that begin there, the one after them
        return self._firsts[chunk] + (row - self.cu_rows[chunk]) // FIELD_ROWS


@dataclass(frozen=True, eq=False)
class FieldPlan:
    """What all layers share.

    Attributes:
        change: which rows were recomputed, and how far they move others.
        cells: where the field's vectors go; of the same chunks.
    """

    change: PropagationPlan
    cells: ChunkCells

    @cached_property
    def blocks(self) -> tuple[_Block, ...]:
        """The weights as the torch definition multiplies them; a GPU is waited for."""
        return tuple(self._block(*block) for block in self.change.blocks)

    def _block(self, rows: slice, entries: slice, weights: Tensor) -> _Block:
        kept = (self.change.entry_of_row[rows] < 0).float()
        count = ceil_div(len(kept), FIELD_ROWS)
        padding = count * FIELD_ROWS - len(kept)
        summed = torch.nn.functional.pad(weights * kept[:, None], (0, 0, 0, padding)).unflatten(0, (count, -1)).sum(1)
        rows_kept = torch.nn.functional.pad(kept, (0, padding)).view(count, -1).sum(1)
        first = self.cells.at(rows.start)
        return slice(first, first + count), entries, summed / rows_kept.clamp_min(1.0)[:, None]


def change_field(
    cached_keys: Tensor,
    cached_values: Tensor,
    fresh_keys: Tensor,
    fresh_values: Tensor,
    plan: FieldPlan,
    key_field: Tensor,
    value_field: Tensor,
    *,
    key_strength: float | Tensor,
    value_strength: float | Tensor,
    places: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Write the field of one layer; what no chunk's cell is, is left alone.

    Args:
        cached_keys, cached_values: (n, kv_heads, head_dim), what the recomputed rows were, in the order of the plan,
            keys un-rotated; heads of a row contiguous, rows at any stride.
        fresh_keys, fresh_values: (n, kv_heads, head_dim), what they are now, likewise.
        plan: the recomputed rows, and where cells lie.
        key_field, value_field: (entries, block_size / FIELD_ROWS, kv_heads, head_dim), contiguous, of any float type;
            at least the chunks' entries.
        key_strength, value_strength: a number, or (kv_heads,) fp32.
        places: (n,) int64, where each recomputed row is among the cached ones, which are then any number, those of a
            pool for one; without it they are the rows themselves.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    _check_inputs(cached_keys, cached_values, fresh_keys, fresh_values, plan, (key_field, value_field), places)
    _check_strengths(cached_keys.shape[1], (key_strength, value_strength))
    if resolve_backend(key_field, backend) is Backend.TORCH:
        change_field_torch(
            cached_keys, cached_values, fresh_keys, fresh_values, plan, key_field, value_field,
            key_strength=key_strength, value_strength=value_strength, places=places,
        )  # fmt: skip
        return
    change, (kv_heads, head_dim) = plan.change, cached_keys.shape[1:]
    if len(change.tiles) == 0 or kv_heads * head_dim == 0:
        return
    strengths, by_head = strengths_alike(key_strength, value_strength, cached_keys)
    _change_field_kernel[(len(change.tiles), kv_heads, 2)](
        cached_keys, cached_values, fresh_keys, fresh_values, change.selected if places is None else places,
        change.selected, change.voices, change.shares, change.entry_of_row, change.tiles, plan.cells.of_tiles,
        *(by_head or (key_field, key_field)), key_field, value_field,
        cached_keys.stride(0), cached_values.stride(0), fresh_keys.stride(0), fresh_values.stride(0), *strengths,
        -0.5 * 1.4426950408889634 / change.sigma**2,  # the kernel works with powers of two
        change.reach,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM_PADDED=max(16, next_power_of_2(head_dim)), ROWS=TILE_ROWS,
        FIELD_ROWS=FIELD_ROWS, ENTRIES=32, BY_HEAD=by_head is not None, HAS_PLACES=places is not None,
        # The interpreter cannot multiply bf16 matrices, so there the products are taken in fp32.
        UPCAST=not key_field.is_cuda, num_warps=8, num_stages=2,
    )  # fmt: skip


def change_field_torch(
    cached_keys: Tensor,
    cached_values: Tensor,
    fresh_keys: Tensor,
    fresh_values: Tensor,
    plan: FieldPlan,
    key_field: Tensor,
    value_field: Tensor,
    *,
    key_strength: float | Tensor,
    value_strength: float | Tensor,
    places: Tensor | None = None,
) -> None:
    """Do what `change_field` does: the definition, in fp32."""
    if places is not None:
        cached_keys, cached_values = cached_keys[places], cached_values[places]
    for cached, fresh, strength, field in (
        (cached_keys, fresh_keys, key_strength, key_field),
        (cached_values, fresh_values, value_strength, value_field),
    ):
        change = fresh.float() - cached.float()
        change *= strength if isinstance(strength, float | int) else strength[:, None]
        flat = field.flatten(0, 1).flatten(1)
        for cells, entries, weights in plan.blocks:
            flat[cells] = (weights @ change[entries].flatten(1)).to(field.dtype)


def _check_inputs(
    cached_keys: Tensor,
    cached_values: Tensor,
    fresh_keys: Tensor,
    fresh_values: Tensor,
    plan: FieldPlan,
    fields: tuple[Tensor, Tensor],
    places: Tensor | None,
) -> None:
    if cached_keys.dim() != 3:
        raise KernelInputError(f"cached_keys must be (rows, kv_heads, head_dim), got {tuple(cached_keys.shape)}")
    if plan.cells.cu_rows != plan.change.cu_rows:
        raise KernelInputError("the cells are those of other chunks than the plan's")
    kv_heads, head_dim = cached_keys.shape[1:]
    expected = (len(plan.change.selected), kv_heads, head_dim)
    if places is not None and (places.shape != expected[:1] or not places.is_contiguous()):
        raise KernelInputError(f"places must be ({expected[0]},), got {tuple(places.shape)}")
    lying = expected if places is None else (len(cached_keys), kv_heads, head_dim)
    for name, heads, shape in (
        ("cached_keys", cached_keys, lying),
        ("cached_values", cached_values, lying),
        ("fresh_keys", fresh_keys, expected),
        ("fresh_values", fresh_values, expected),
    ):
        if heads.shape != shape:
            raise KernelInputError(f"{name} must be {shape}, got {tuple(heads.shape)}")
        if heads.numel() and heads.stride()[1:] != (head_dim, 1):
            raise KernelInputError(f"the heads of one row of {name} must be contiguous, got strides {heads.stride()}")
    if cached_keys.dtype != fresh_keys.dtype or cached_values.dtype != fresh_values.dtype:
        raise KernelInputError(
            f"cached and fresh rows must share a type, got {cached_keys.dtype}, {fresh_keys.dtype} of keys and "
            f"{cached_values.dtype}, {fresh_values.dtype} of values"
        )
    for field in fields:
        fits = field.dim() == 4 and field.shape[2:] == (kv_heads, head_dim) and field.is_contiguous()
        if not fits or field.shape[0] * field.shape[1] < plan.cells.num_cells:
            raise KernelInputError(
                f"a field must be (entries, cells of a block, {kv_heads}, {head_dim}) contiguous, with "
                f"{plan.cells.num_cells} cells or more, got {tuple(field.shape)}"
            )


def _check_strengths(kv_heads: int, strengths: tuple[float | Tensor, float | Tensor]) -> None:
    for strength in strengths:
        if isinstance(strength, Tensor) and (strength.shape != (kv_heads,) or strength.dtype != torch.float32):
            raise KernelInputError(f"a strength must be a number or ({kv_heads},) fp32, got {tuple(strength.shape)}")


@launched
def _change_field_kernel(
    cached_key_ptr, cached_value_ptr, fresh_key_ptr, fresh_value_ptr, place_ptr, selected_ptr, voice_ptr, share_ptr,
    entry_ptr, tile_ptr, cell_ptr, key_strength_ptr, value_strength_ptr, key_field_ptr, value_field_ptr,
    stride_ck, stride_cv, stride_fk, stride_fv, key_strength, value_strength, exponent, reach,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr,
    FIELD_ROWS: tl.constexpr, ENTRIES: tl.constexpr, BY_HEAD: tl.constexpr, HAS_PLACES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # This program moves the keys or the values of one tile for one head, and writes the means of its cells.
    tile, head, is_value = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cached_ptr = cached_value_ptr if is_value else cached_key_ptr
    fresh_ptr = fresh_value_ptr if is_value else fresh_key_ptr
    field_ptr = value_field_ptr if is_value else key_field_ptr
    stride_cr = stride_cv if is_value else stride_ck
    stride_fr = stride_fv if is_value else stride_fk
    CELLS: tl.constexpr = ROWS // FIELD_ROWS
    first_row, end_row = tl.load(tile_ptr + tile * 4), tl.load(tile_ptr + tile * 4 + 1)
    first_entry, end_entry = tl.load(tile_ptr + tile * 4 + 2), tl.load(tile_ptr + tile * 4 + 3)
    row = first_row + tl.arange(0, ROWS)
    is_kept = tl.load(entry_ptr + row, mask=row < end_row, other=0) < 0
    column = tl.arange(0, DIM_PADDED)[None, :]
    channel = head * HEAD_DIM + column

    moved = tl.zeros((ROWS, DIM_PADDED), tl.float32)
    for start in range(first_entry, end_entry, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        is_entry = entry < end_entry
        chosen = tl.load(selected_ptr + entry, mask=is_entry, other=0)
        distance = row[:, None] - chosen.to(tl.int32)[None, :]
        near = (tl.abs(distance) <= reach) & is_entry[None, :]
        step = distance.to(tl.float32)
        voice = tl.load(voice_ptr + entry, mask=is_entry, other=0.0)
        weight = tl.where(near, tl.exp2(step * step * exponent + voice[None, :]), 0.0)
        source, mask = entry.to(tl.int64), is_entry[:, None] & (column < HEAD_DIM)
        now = tl.load(fresh_ptr + source[:, None] * stride_fr + channel, mask=mask, other=0.0)
        if HAS_PLACES:
            source = tl.load(place_ptr + entry, mask=is_entry, other=0)
        was = tl.load(cached_ptr + source[:, None] * stride_cr + channel, mask=mask, other=0.0)
        change = (now.to(tl.float32) - was.to(tl.float32)).to(now.dtype)
        weight = weight.to(now.dtype)
        if UPCAST:
            weight, change = weight.to(tl.float32), change.to(tl.float32)
        moved = tl.dot(weight, change, acc=moved, input_precision="ieee")

    strength = value_strength if is_value else key_strength
    if BY_HEAD:
        strength = tl.load((value_strength_ptr if is_value else key_strength_ptr) + head)
    share = strength * tl.load(share_ptr + row, mask=row < end_row, other=0.0)
    kept = tl.sum(tl.reshape(is_kept.to(tl.float32), (CELLS, FIELD_ROWS)), axis=1)
    summed = tl.sum(tl.reshape(moved * share[:, None], (CELLS, FIELD_ROWS, DIM_PADDED)), axis=1)
    mean = summed / tl.maximum(kept, 1.0)[:, None]
    in_tile = tl.arange(0, CELLS)
    cell = (tl.load(cell_ptr + tile) + in_tile).to(tl.int64)[:, None]
    mask = (first_row + in_tile * FIELD_ROWS < end_row)[:, None] & (column < HEAD_DIM)
    tl.store(field_ptr + cell * (KV_HEADS * HEAD_DIM) + channel, mean.to(field_ptr.dtype.element_ty), mask=mask)
