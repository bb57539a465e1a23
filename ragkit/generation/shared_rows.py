"""Shared rows of a blend: chunks stay in blocks that other requests use too, and their change is a field beside them.

Recomputed rows go to private rows that stand in the place of the shared ones. The others' change is averaged over
cells of 16 rows of a chunk (`change_field`), and attention adds it while it loads them: in this pass, and in every
decoding step after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.generation.blend_pass import ActiveTokens, BlendInputs, PassScope, Propagation
from ragkit.generation.decoder import Projected
from ragkit.kernels.change_field import ChunkCells, FieldPlan, change_field
from ragkit.kernels.host_copy import to_device
from ragkit.kernels.paged_rows import FIELD_ROWS
from ragkit.kernels.paged_selected_attention import ordered_entries, paged_selected_attention
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kvcache.request_field import RequestField
from ragkit.kvcache.request_kv import RequestKV


def shared_slots(kv: RequestKV, num_tokens: int) -> Tensor:
    """Return (num_tokens,) int64 on the host: the row of the pool that holds each position, shared ones included."""
    return kv.slots_at(kv.places()[:num_tokens])


class SharedRows:
    """The `RowTarget` of a request that lists its chunks, for one pass.

    Args:
        kv: the request, with a row for every position; those of the prompt's first tokens are written.
        inputs: what the pass works on; its slots are those of `shared_slots`.
        chosen: (tokens,) int64 ascending positions that the pass computes from its first layer on.
        propagation: how their change moves the others.

    Attributes:
        slots: (positions,) int64, the row that a token computed at each position is written to.

    Raises:
        CacheCapacityError: the pool has too few free blocks for the recomputed rows.
    """

    def __init__(
        self,
        kv: RequestKV,
        inputs: BlendInputs,
        chosen: Tensor,
        propagation: Propagation,
    ) -> None:
        device = kv.pool.device
        self.kv = kv
        self.chosen = chosen
        self.cached = inputs.slots
        self.slots = inputs.slots.index_copy(0, chosen, to_device(kv.replace_unseen(chosen), device))
        self.cells = ChunkCells(inputs.tiles.cu_rows, kv.pool.block_size, device)
        kv.field = None if propagation.is_off or not len(chosen) else RequestField(kv.pool, len(kv.block_ids))

    def begin(self, scope: PassScope) -> SharedLayers:
        """Return what takes the layers of the pass."""
        return SharedLayers(self, scope)


class SharedLayers:
    """The `PlacedLayers` of a request that lists its chunks."""

    def __init__(self, rows: SharedRows, scope: PassScope) -> None:
        self._rows = rows
        self._scope = scope
        self._pool = rows.kv.pool
        self._table = rows.kv.on_device()
        self._order = ordered_entries(self._table.row_positions, self._table.num_entries)
        self._cu_queries: dict[int, Tensor] = {}
        self._active: ActiveTokens | None = None

    def place(self, layer: int, active: ActiveTokens, projected: Projected) -> None:
        """Write the layer's rows, as `PlacedLayers` says."""
        if active is not self._active:
            self._follow(active)
        key_pool, value_pool, rotary = self._pool.keys[layer], self._pool.values[layer], self._scope.rotary
        self._write_field(layer, active, projected)
        self._write_dropped(layer)
        rope_write_kv(
            projected.queries, projected.keys, projected.values, active.positions, active.slots,
            rotary.cos, rotary.sin, key_pool, value_pool, rotate_keys=False,
        )  # fmt: skip

    def attend(self, layer: int, queries: Tensor, positions: Tensor) -> Tensor:
        """Return the attention output, as `PlacedLayers` says."""
        field = self._rows.kv.field
        key_field, value_field = (None, None) if field is None else field.of_requests(layer, 1)
        return paged_selected_attention(
            queries, self._pool.keys[layer], self._pool.values[layer], *self._table,
            positions, self._bounds(len(queries)), self._scope.rotary.cos, self._scope.rotary.sin,
            key_field=key_field, value_field=value_field, order=self._order, scale=self._scope.decoder.scale,
        )  # fmt: skip

    def _follow(self, active: ActiveTokens) -> None:
        """Take in which tokens are computed from this layer on."""
        rows = self._rows
        self._active = active
        self._was = rows.cached[active.chosen]
        self._plan = FieldPlan(active.plan, rows.cells)
        # Computed in lower layers only: their private rows hold, from here on, what shared rows are for this request.
        self._dropped = rows.chosen[:0]
        if len(active.chosen) < len(rows.chosen):
            self._dropped = rows.chosen[active.plan.entry_of_row[rows.chosen] < 0]
            places = to_device(rows.kv.places(), self._pool.device)
            self._dropped_cells = places[self._dropped] // FIELD_ROWS

    def _write_field(self, layer: int, active: ActiveTokens, projected: Projected) -> None:
        field = None if self._rows.kv.field is None else self._rows.kv.field.layer(layer)
        if field is None:
            return
        count = len(active.chosen)
        keys, values = projected.keys[:count], projected.values[:count]
        old_keys, old_values = self._pool.keys[layer].flatten(0, 1), self._pool.values[layer].flatten(0, 1)
        key_strength, value_strength = active.strengths(
            self._scope.propagation, layer, lambda: (keys - old_keys[self._was], values - old_values[self._was])
        )
        change_field(
            old_keys, old_values, keys, values, self._plan, *field,
            key_strength=key_strength, value_strength=value_strength, places=self._was,
        )  # fmt: skip

    def _write_dropped(self, layer: int) -> None:
        if not len(self._dropped):
            return
        rows = self._rows
        kept = self._pool.rows(layer, rows.cached[self._dropped])
        if rows.kv.field is not None:
            kept = rows.kv.field.added(layer, *kept, self._dropped_cells)
        for target, own in zip((self._pool.keys[layer], self._pool.values[layer]), kept, strict=True):
            target.flatten(0, 1).index_copy_(0, rows.slots[self._dropped], own)

    def _bounds(self, queries: int) -> Tensor:
        """Return the `cu_queries` of one request; few counts occur in a pass."""
        if queries not in self._cu_queries:
            bounds = torch.tensor([0, queries], dtype=torch.int32)
            self._cu_queries[queries] = to_device(bounds, self._pool.device)
        return self._cu_queries[queries]
