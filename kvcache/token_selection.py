"""Which tokens of reused chunks are recomputed: what a selector sees, what it promises, and the choosing by scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ragkit.kernels.host_copy import to_device
from ragkit.kvcache.coverage import Coverage


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Where a chunk stands in the prompt: the positions from `start` up to `stop`.

    Attributes:
        is_exact: its reused KV is what full prefill would compute (it stands behind the very tokens that it was
            computed behind), so recomputing it gains nothing.
    """

    start: int
    stop: int
    is_exact: bool = False


class LayerRange(NamedTuple):
    """Layers between two parts of a model's depth, from 0 (the first) to 1 (behind the last)."""

    start: float
    stop: float

    def of(self, num_layers: int) -> range:
        """Return the indices of the layers, for a model of so many; at least one."""
        start = min(round(self.start * num_layers), num_layers - 1)
        return range(start, max(round(self.stop * num_layers), start + 1))


class Deviation(NamedTuple):
    """How far the reused rows of one layer are from the fresh ones: (tokens,) fp32 squared L2 distances."""

    keys: Tensor
    values: Tensor


class ChunkAttention(NamedTuple):
    """What tokens attend to in one layer: (tokens,) fp32 sums of attention weights over the heads.

    Attributes:
        inter: weights of earlier chunks; what stands before the first chunk is none.
        density: the same, of each earlier chunk over its number of tokens.
        intra: weights of the token's own chunk.
    """

    inter: Tensor
    density: Tensor
    intra: Tensor


class FreshRows(Protocol):
    """What can be measured of the tokens that a layer has just computed; nothing is until it is asked for."""

    def deviation(self) -> Deviation:
        """Return the distances of their keys and values to the reused ones."""
        ...

    def chunk_attention(self) -> ChunkAttention:
        """Return their attention to earlier chunks and to their own; it costs about one attention of the layer."""
        ...


class SelectionScene(Protocol):
    """One prompt as a selector sees it."""

    @property
    def spans(self) -> Sequence[ChunkSpan]:
        """The chunks, behind each other without gaps."""
        ...

    @property
    def budget(self) -> int:
        """Most tokens to recompute: all tokens of `spans`, or at most those whose KV is not exact already."""
        ...

    @property
    def coverage(self) -> Coverage | None:
        """Where to stop before the budget, for selectors that can; None spends all of it."""
        ...

    @property
    def device(self) -> torch.device:
        """Where positions and scores lie."""
        ...

    def question_mass(self, layers: LayerRange, repaired: Tensor | None = None) -> Tensor:
        """Return (positions,) fp32: the attention that each position receives from the question's tokens.

        Args:
            layers: the layers whose attention is summed; those above are neither loaded nor run for it.
            repaired: (tokens,) int64 ascending positions that are recomputed first; None scores the reused KV as it is.
        """
        ...


class TokenSelector(Protocol):
    """Chooses the tokens of reused chunks that are recomputed."""

    @property
    def name(self) -> str:
        """The name in configurations and tables."""
        ...

    @property
    def meets_coverage(self) -> bool:
        """Whether it heeds a scene's `coverage`."""
        ...

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return (tokens,) int64, the ascending positions that are computed from the first layer on."""
        ...

    def narrow(self, scene: SelectionScene, layer: int, chosen: Tensor, fresh: FreshRows) -> Tensor | None:
        """Return which of `chosen` are computed beyond the attention of `layer`, or None for all of them.

        Args:
            scene: the prompt.
            layer: index of the layer whose keys and values were just computed for `chosen`.
            chosen: (tokens,) int64 ascending positions.
            fresh: measures them.

        Returns:
            (tokens,) bool over `chosen`, or None.
        """
        ...


class ChosenOnce:
    """Base of selectors that choose before the first layer and stay with it."""

    meets_coverage = False

    def narrow(self, scene: SelectionScene, layer: int, chosen: Tensor, fresh: FreshRows) -> Tensor | None:
        """Return None: all of them stay."""
        return None


def all_positions(scene: SelectionScene) -> Tensor:
    """Return every position of the scene's chunks."""
    return torch.arange(scene.spans[0].start, scene.spans[-1].stop, device=scene.device)


def worth_choosing(scene: SelectionScene) -> Tensor:
    """Return the ascending positions of chunks whose reused KV is not exact already."""
    return to_device(torch.from_numpy(_worth_choosing(scene)), scene.device)


def enough_tokens(scene: SelectionScene, coverage: Coverage, mass: Tensor, first: Tensor) -> int:
    """Return the least number of tokens that meets `coverage`, exact chunks left out.

    On a GPU the host waits for it, once a request: how many tokens go on is a shape, and depends on data.

    Args:
        scene: the prompt.
        coverage: what is to be covered.
        mass: (positions,) the question's attention.
        first: ascending positions, of no exact chunk, that are taken before all others; these follow by mass.
    """
    wanted = worth_choosing(scene)
    return coverage.tokens(mass[wanted], torch.searchsorted(wanted, first), scene.spans[-1].stop - scene.spans[0].start)


def highest(scene: SelectionScene, scores: Tensor, budget: int, taken: Tensor | None = None) -> Tensor:
    """Return the ascending positions of the `budget` highest scores, with those of `taken` added.

    Chunks that are exact already come last, whatever their scores: they are chosen only where the budget is larger
    than the rest.

    Args:
        scene: the prompt.
        scores: (positions,) over the whole prompt, finite.
        budget: how many positions to return, `taken` included.
        taken: ascending positions that are chosen already.
    """
    start, stop = scene.spans[0].start, scene.spans[-1].stop
    asked = scores[start:stop]
    rank = asked.clone()
    if any(span.is_exact for span in scene.spans):
        low, high = asked.aminmax()
        below = 2 * (low - high) - 2
        for span in scene.spans:
            if span.is_exact:  # below all others, and among themselves in their order
                rank[span.start - start : span.stop - start].add_(below)
    if taken is not None:
        # Not by an assignment: a GPU gets the number by a copy that the host waits for.
        rank.index_fill_(0, taken - start, torch.inf)
    count = min(max(budget, 0 if taken is None else len(taken)), stop - start)
    return rank.topk(count, sorted=False).indices.sort().values + start


def evenly_spaced(scene: SelectionScene, count: int) -> Tensor:
    """Return `count` ascending positions at equal distances over the chunks whose KV is not exact."""
    wanted = _worth_choosing(scene)
    count = min(count, len(wanted))
    # On the host, which knows all of it: one copy instead of half a dozen launches.
    index = (np.arange(count, dtype=np.float32) * np.float32(len(wanted) / max(count, 1))).astype(np.int64)
    return to_device(torch.from_numpy(wanted[index]), scene.device)


def _worth_choosing(scene: SelectionScene) -> npt.NDArray[np.int64]:
    parts = [np.arange(span.start, span.stop, dtype=np.int64) for span in scene.spans if not span.is_exact]
    return np.concatenate((np.empty(0, dtype=np.int64), *parts))
