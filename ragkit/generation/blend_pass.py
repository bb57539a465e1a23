"""The pass that recomputes chosen tokens among reused rows, moves the others by what it learns, and gives logits.

Every layer: the chosen tokens and the prompt's ending get fresh keys and values; the reused rows of each chunk move by
the smoothed change of its chosen ones (change propagation); the fresh tokens attend to all rows up to their own
position. Attention is causal by true position: a chosen token never sees a later one. Where rows lie, and how they
move there, is a `RowTarget`: private copies of all of them, or shared blocks with a field beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ragkit.generation.decoder import Decoder, Projected
from ragkit.generation.projected_rows import ProjectedRows
from ragkit.generation.reused_rows import RowSource
from ragkit.generation.strategy import PrefillRequest
from ragkit.kernels.host_copy import to_device
from ragkit.kernels.propagation_plan import ChunkTiles, PropagationPlan
from ragkit.kvcache.change_strength import ChangeStrength
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.pool import KVPool
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

    sigma: float = 96.0
    key_strength: float = 0.5
    value_strength: float = 1.0
    by_evidence: bool = False

    @property
    def is_off(self) -> bool:
        """Whether nothing moves."""
        return self.key_strength == 0 and self.value_strength == 0


@dataclass(frozen=True, slots=True)
class BlendInputs:
    """What a blend needs on the device beside KV.

    Attributes:
        pool: where the request's rows are.
        token_ids: (positions,) int64, the whole prompt.
        slots: (positions,) int64, the row of the pool that holds each position, or will, counted over blocks.
        tiles: how the rows of prefix and chunks are cut for propagation.
    """

    pool: KVPool
    token_ids: Tensor
    slots: Tensor
    tiles: ChunkTiles

    @classmethod
    def of(cls, request: PrefillRequest, spans: Sequence[ChunkSpan], sigma: float, slots: Tensor) -> BlendInputs:
        """Return those of `request`, whose rows are `slots` on the host."""
        device = request.kv.pool.device
        token_ids, slots = request.token_ids(), to_device(slots, device)
        # The prefix counts as one more chunk, of which nothing is recomputed: it is copied with the others.
        cu_rows = (0, *(span.start for span in spans), spans[-1].stop)
        return cls(request.kv.pool, token_ids, slots, ChunkTiles(cu_rows, sigma, device))


@dataclass(slots=True)
class ActiveTokens:
    """The tokens that a layer computes, chosen ones and the ending, and what follows from them for all layers.

    Attributes:
        chosen: (tokens,) int64 ascending positions of chunk tokens.
        positions: (tokens,) int64, those of the ending behind them; `positions_int32` the same.
        slots: (tokens,) int64, the rows of the target that they are written to.
        plan: how the chosen ones move the others.
        strength: how far, by evidence; None for all of it.
    """

    chosen: Tensor
    positions: Tensor
    positions_int32: Tensor
    slots: Tensor
    plan: PropagationPlan
    strength: ChangeStrength | None = None

    def strengths(
        self, propagation: Propagation, layer: int, change: Callable[[], LayerKV]
    ) -> tuple[float | Tensor, float | Tensor]:
        """Return how much of the smoothed change of keys and of values moves the other rows in a layer.

        Args:
            propagation: how rows move.
            layer: which layer.
            change: gives fresh minus reused keys and values of the chosen tokens.
        """
        if layer == 0:
            return 0.0, 0.0  # keys and values of the first layer depend on their token alone
        if self.strength is None:
            return propagation.key_strength, propagation.value_strength
        keys, values = change()
        return propagation.key_strength * self.strength.of(keys), propagation.value_strength * self.strength.of(values)


@dataclass(frozen=True, slots=True)
class PassScope:
    """What a target needs to know of the pass that writes into it.

    Attributes:
        decoder: the model.
        rotary: the request's rotary table.
        rows: the reused KV of prefix and chunks.
        num_tokens: positions of the prompt.
        stop: position where the ending begins.
        propagation: how the change of recomputed tokens moves the others.
    """

    decoder: Decoder
    rotary: RotaryTable
    rows: RowSource
    num_tokens: int
    stop: int
    propagation: Propagation


class RowTarget(Protocol):
    """Where the rows of a pass go, and how its tokens attend to them; layers come in order."""

    @property
    def slots(self) -> Tensor:
        """(positions,) int64, the row that a token computed at each position is written to."""
        ...

    def begin(self, scope: PassScope) -> PlacedLayers:
        """Return what takes the layers of one pass."""
        ...


class PlacedLayers(Protocol):
    """The rows of one pass, layer by layer."""

    def place(self, layer: int, active: ActiveTokens, projected: Projected) -> None:
        """Write the layer's rows: fresh ones, and the others moved by their change. Rotates the queries in place."""
        ...

    def attend(self, layer: int, queries: Tensor, positions: Tensor) -> Tensor:
        """Return the attention output of some of the active tokens, after `place`.

        Args:
            layer: which layer.
            queries: (tokens, q_heads, head_dim), rotated.
            positions: (tokens,) int32, ascending.
        """
        ...


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

    def run(self, chosen: Tensor, target: RowTarget, selector: TokenSelector | None = None) -> Tensor:
        """Return (vocab_size,) logits after the prompt; the rows of all positions and layers are in `target` then.

        Args:
            chosen: (tokens,) int64 ascending positions of chunk tokens, computed from the first layer on.
            target: where the rows go.
            selector: may narrow `chosen` after each layer.
        """
        decoder = self._decoder
        scope = PassScope(decoder, self._rotary, self._rows, len(self._token_ids), self._stop, self._propagation)
        placed = target.begin(scope)
        active = self._activate(chosen, target.slots)
        activations = decoder.embed(self._token_ids[active.positions])
        for layer in range(decoder.config.num_layers):
            projected = decoder.project(layer, activations)
            keep = self._narrowed(selector, layer, active.chosen, projected)
            placed.place(layer, active, projected)
            queries, residual = projected.queries, projected.residual
            self.row_layers += len(active.chosen)
            if keep is not None:
                # The host waits here: how many tokens stay is a shape. The default selector narrows nothing.
                rows = torch.cat((keep.nonzero().squeeze(1), torch.arange(len(keep), len(queries), device=keep.device)))
                queries, residual = queries[rows], residual[rows]
                active = self._activate(active.chosen[keep], target.slots)
            positions = active.positions_int32
            if layer + 1 == decoder.config.num_layers:  # all keys and values are there: only the last token goes on
                # Its position is cloned: an address that is no multiple of 16 bytes has kernels compiled for it.
                queries, residual, positions = queries[-1:], residual[-1:], positions[-1:].clone()
            activations = decoder.complete(layer, placed.attend(layer, queries, positions), residual)
        return decoder.logits(activations)[0]

    def _activate(self, chosen: Tensor, slots: Tensor) -> ActiveTokens:
        positions = torch.cat((chosen, self._ending))
        active = ActiveTokens(chosen, positions, positions.to(torch.int32), slots[positions], self._tiles.plan(chosen))
        propagation = self._propagation
        if propagation.by_evidence and not propagation.is_off and len(chosen):
            # The host waits here: how many tokens were chosen in each chunk is a shape. By default none is asked.
            cu_selected = torch.searchsorted(chosen, self._tiles.cuts)
            active.strength = ChangeStrength(chosen, cu_selected.tolist(), propagation.sigma, active.plan.stands_for)
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
