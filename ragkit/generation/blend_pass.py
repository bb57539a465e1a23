"""The pass that recomputes chosen tokens among reused rows, moves the others by what it learns, and gives logits.

Every layer: the chosen tokens and the prompt's ending get fresh keys and values; the reused rows of each chunk move by
the smoothed change of its chosen ones (change propagation); the fresh tokens attend to all rows up to their own
position. Attention is causal by true position: a chosen token never sees a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ragkit.generation.decoder import Decoder, Projected
from ragkit.generation.projected_rows import ProjectedRows
from ragkit.generation.reused_rows import ReusedRows, RowSource, unwritten_layer
from ragkit.generation.strategy import PrefillRequest
from ragkit.kernels.host_copy import to_device
from ragkit.kernels.propagate_change import propagate_change
from ragkit.kernels.propagation_plan import ChunkTiles, PropagationPlan
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kernels.selected_attention import selected_attention
from ragkit.kvcache.change_strength import ChangeStrength
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.kvcache.token_selection import ChunkSpan, SelectionScene, TokenSelector


@dataclass(frozen=True, slots=True)
class Propagation:
    """How the change of recomputed tokens moves the others of their chunk.

    Attributes:
        sigma: standard deviation in tokens of the Gaussian that weighs the recomputed ones by distance.
        key_strength, value_strength: part of the smoothed change that is applied; 0 for none.
        by_evidence: whether each layer and head applies only the part that predicts recomputed rows from one another.
    """

    sigma: float = 48.0
    key_strength: float = 1.0
    value_strength: float = 1.0
    by_evidence: bool = False

    @property
    def is_off(self) -> bool:
        """Whether nothing moves."""
        return self.key_strength == 0 and self.value_strength == 0


@dataclass(frozen=True, slots=True)
class BlendInputs:
    """What a blend needs on the device beside KV. It is sent there first: small copies would wait behind the KV.

    Attributes:
        token_ids: (positions,) int64, the whole prompt.
        slots: (positions,) int64, the row of the pool of each position, counted over blocks.
        tiles: how the rows of prefix and chunks are cut for propagation.
    """

    token_ids: Tensor
    slots: Tensor
    tiles: ChunkTiles

    @classmethod
    def of(cls, request: PrefillRequest, spans: Sequence[ChunkSpan], sigma: float) -> BlendInputs:
        """Return those of `request`, whose rows are reserved."""
        device = request.kv.pool.device
        token_ids = request.token_ids()
        slots = to_device(request.kv.slots(0, len(token_ids)), device)
        # The prefix counts as one more chunk, of which nothing is recomputed: it is copied with the others.
        cu_rows = (0, *(span.start for span in spans), spans[-1].stop)
        return cls(token_ids, slots, ChunkTiles(cu_rows, sigma, device))


@dataclass(frozen=True, slots=True)
class RowSink:
    """Where blended rows are written: position i goes to row `slots[i]`, counted over blocks, of each layer's tensors.

    Attributes:
        layers: keys (before RoPE) and values (blocks, block_size, kv_heads, head_dim) of each layer.
        slots: (positions,) int64.
    """

    layers: Sequence[LayerKV]
    slots: Tensor

    @classmethod
    def over(cls, rows: ReusedRows) -> RowSink:
        """Return the sink that writes into `rows`."""
        keys, _ = rows.layers[0]
        layers = [(keys.unsqueeze(0), values.unsqueeze(0)) for keys, values in rows.layers]
        return cls(layers, torch.arange(len(keys), device=keys.device))


class BlendPass:
    """Recomputes tokens of one prompt.

    Args:
        decoder: the model.
        rotary: the request's rotary table.
        scene: the prompt as selectors see it.
        rows: the reused KV of prefix and chunks, asked for layer by layer.
        inputs: what it needs beside them.
        propagation: how the change of recomputed tokens moves the others.
    """

    def __init__(
        self,
        decoder: Decoder,
        rotary: RotaryTable,
        scene: SelectionScene,
        rows: RowSource,
        inputs: BlendInputs,
        propagation: Propagation,
    ) -> None:
        self._decoder = decoder
        self._rotary = rotary
        self._scene = scene
        self._rows = rows
        self._token_ids = inputs.token_ids
        self._propagation = propagation
        self._stop = scene.spans[-1].stop
        self._tiles = inputs.tiles
        self._ending = torch.arange(self._stop, len(inputs.token_ids), device=decoder.device)
        self.row_layers = 0  # rows times layers that were computed, the ending's left out

    def run(self, chosen: Tensor, sink: RowSink, selector: TokenSelector | None = None) -> Tensor:
        """Return (vocab_size,) logits after the prompt; the rows of all positions and layers are in `sink` then.

        Args:
            chosen: (tokens,) int64 ascending positions of chunk tokens, computed from the first layer on.
            sink: where the rows go.
            selector: may narrow `chosen` after each layer.
        """
        decoder = self._decoder
        scratch = unwritten_layer(decoder, 0, len(self._token_ids))
        active = self._activate(chosen, sink)
        activations = decoder.embed(self._token_ids[active.positions])
        for layer in range(decoder.config.num_layers):
            projected = decoder.project(layer, activations)
            keep = self._narrowed(selector, layer, active.chosen, projected)
            self._blend(layer, active, projected.keys, projected.values, sink, scratch)
            self._write_fresh(layer, active, projected.queries, projected.keys, projected.values, sink, scratch)
            queries, residual = projected.queries, projected.residual
            self.row_layers += len(active.chosen)
            if keep is not None:
                rows = torch.cat((keep.nonzero().squeeze(1), torch.arange(len(keep), len(queries), device=keep.device)))
                queries, residual = queries[rows], residual[rows]
                active = self._activate(active.chosen[keep], sink)
            positions = active.positions_int32
            if layer + 1 == decoder.config.num_layers:  # all keys and values are there: only the last token goes on
                queries, residual, positions = queries[-1:], residual[-1:], positions[-1:]
            attended = selected_attention(queries, *scratch, positions, scale=decoder.scale)
            activations = decoder.complete(layer, attended, residual)
        return decoder.logits(activations)[0]

    def _activate(self, chosen: Tensor, sink: RowSink) -> _Active:
        positions = torch.cat((chosen, self._ending))
        active = _Active(chosen, positions, positions.to(torch.int32), sink.slots[positions], self._tiles.plan(chosen))
        propagation = self._propagation
        if propagation.by_evidence and not propagation.is_off and len(chosen):
            cu_selected = torch.searchsorted(chosen, torch.tensor(self._tiles.cu_rows, device=chosen.device))
            active.strength = ChangeStrength(chosen, cu_selected.tolist(), propagation.sigma)
        return active

    def _narrowed(
        self, selector: TokenSelector | None, layer: int, chosen: Tensor, projected: Projected
    ) -> Tensor | None:
        if selector is None:
            return None
        fresh = ProjectedRows(
            projected,
            chosen,
            partial(self._rows.layer, layer),
            self._tiles.cu_rows[1:],
            self._rotary,
            self._decoder.scale,
        )
        return selector.narrow(self._scene, layer, chosen, fresh)

    def _blend(
        self, layer: int, active: _Active, keys: Tensor, values: Tensor, sink: RowSink, scratch: LayerKV
    ) -> None:
        """Write the rows of prefix and chunks, moved by the change, into the sink and rotated into the scratch."""
        old_keys, old_values = self._rows.layer(layer)
        stop = self._stop
        fresh_keys, fresh_values = keys[: len(active.chosen)], values[: len(active.chosen)]
        key_strength: float | Tensor = self._propagation.key_strength
        value_strength: float | Tensor = self._propagation.value_strength
        if layer == 0:
            key_strength = value_strength = 0.0  # keys and values of the first layer depend on their token alone
        elif active.strength is not None:
            key_strength = key_strength * active.strength.of(fresh_keys - old_keys[active.chosen])
            value_strength = value_strength * active.strength.of(fresh_values - old_values[active.chosen])
        propagate_change(
            old_keys[:stop], old_values[:stop], fresh_keys, fresh_values,
            active.plan, sink.slots[:stop], *sink.layers[layer],
            key_strength=key_strength, value_strength=value_strength,
            cos=self._rotary.cos, sin=self._rotary.sin,
            rotated_keys=scratch[0], plain_values=scratch[1],
        )  # fmt: skip

    def _write_fresh(
        self,
        layer: int,
        active: _Active,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sink: RowSink,
        scratch: LayerKV,
    ) -> None:
        """Rotate the queries, and write the ending's rows; the chosen ones' are in place already."""
        key_pool, value_pool = sink.layers[layer]
        rope_write_kv(
            queries, keys, values, active.positions, active.slots,
            self._rotary.cos, self._rotary.sin, key_pool, value_pool, rotate_keys=True,
        )  # fmt: skip
        behind = len(active.chosen)
        scratch[0][self._stop :], scratch[1][self._stop :] = keys[behind:], values[behind:]


@dataclass(slots=True)
class _Active:
    """The tokens that a layer computes, chosen ones and the ending, and what follows from them for all layers."""

    chosen: Tensor
    positions: Tensor
    positions_int32: Tensor
    slots: Tensor
    plan: PropagationPlan
    strength: ChangeStrength | None = None
