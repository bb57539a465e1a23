"""Private rows of a blend: every row of the prompt is copied to a row of its own, moved, and rotated once more beside.

Attention over the packed, rotated copy of a layer does three times as much a second on a GPU as attention that rotates
while it reads blocks (docs/blending.md), so this is how rows are placed unless they are to be shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.generation.blend_pass import ActiveTokens, PassScope
from ragkit.generation.decoder import Projected
from ragkit.generation.reused_rows import ReusedRows, unwritten_layer
from ragkit.kernels.propagate_change import propagate_change
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kernels.selected_attention import selected_attention
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.pool import KVPool


@dataclass(frozen=True, slots=True)
class RowSink:
    """The `RowTarget` of rows that are written: position i goes to row `slots[i]` of each layer's tensors.

    Attributes:
        layers: keys (before RoPE) and values (blocks, block_size, kv_heads, head_dim) of each layer.
        slots: (positions,) int64, rows counted over blocks.
        pool: whose tensors they are; None for those of a buffer.
    """

    layers: Sequence[LayerKV]
    slots: Tensor
    pool: KVPool | None = None

    @classmethod
    def over(cls, rows: ReusedRows) -> RowSink:
        """Return the sink that writes into `rows`."""
        keys, _ = rows.layers[0]
        layers = [(keys.unsqueeze(0), values.unsqueeze(0)) for keys, values in rows.layers]
        return cls(layers, torch.arange(len(keys), device=keys.device))

    @classmethod
    def into(cls, pool: KVPool, slots: Tensor) -> RowSink:
        """Return the sink that writes into rows of a pool."""
        return cls(list(zip(pool.keys, pool.values, strict=True)), slots, pool)

    def begin(self, scope: PassScope) -> PrivateLayers:
        """Return what writes the layers of one pass here."""
        return PrivateLayers(self, scope)


class PrivateLayers:
    """The `PlacedLayers` of a sink, with a rotated copy of the current layer that attention reads."""

    def __init__(self, sink: RowSink, scope: PassScope) -> None:
        self._sink = sink
        self._scope = scope
        self._scratch = unwritten_layer(scope.decoder, 0, scope.num_tokens)

    def place(self, layer: int, active: ActiveTokens, projected: Projected) -> None:
        """Write the layer's rows, as `PlacedLayers` says."""
        self._blend(layer, active, projected)
        self._write_fresh(layer, active, projected)

    def attend(self, layer: int, queries: Tensor, positions: Tensor) -> Tensor:
        """Return the attention output, as `PlacedLayers` says."""
        return selected_attention(queries, *self._scratch, positions, scale=self._scope.decoder.scale)

    def _blend(self, layer: int, active: ActiveTokens, projected: Projected) -> None:
        """Write the rows of prefix and chunks, moved by the change, into the sink and rotated into the scratch."""
        scope, sink = self._scope, self._sink
        old_keys, old_values, places = scope.rows.stored(layer, sink.pool, sink.slots)
        stop, chosen = scope.stop, active.chosen
        if places is None:
            old_keys, old_values = old_keys[:stop], old_values[:stop]
        keys, values = projected.keys[: len(chosen)], projected.values[: len(chosen)]

        def change() -> LayerKV:
            was = chosen if places is None else places[chosen]
            return keys - old_keys[was], values - old_values[was]

        key_strength, value_strength = active.strengths(scope.propagation, layer, change)
        propagate_change(
            old_keys, old_values, keys, values,
            active.plan, sink.slots[:stop], *sink.layers[layer],
            key_strength=key_strength, value_strength=value_strength,
            cos=scope.rotary.cos, sin=scope.rotary.sin,
            rotated_keys=self._scratch[0], plain_values=self._scratch[1], places=places,
        )  # fmt: skip

    def _write_fresh(self, layer: int, active: ActiveTokens, projected: Projected) -> None:
        """Rotate the queries, and write the ending's rows; the chosen ones' have these numbers already."""
        rotary, (keys, values) = self._scope.rotary, projected[1:3]
        rope_write_kv(
            projected.queries, keys, values, active.positions, active.slots,
            rotary.cos, rotary.sin, *self._sink.layers[layer], rotate_keys=False,
            rotated_keys=self._scratch[0], plain_values=self._scratch[1],
        )  # fmt: skip
