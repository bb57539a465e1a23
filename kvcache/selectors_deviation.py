"""Selectors that compute every token in the first layers and go on with those whose KV changed most."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from ragkit.kvcache.token_selection import Deviation, FreshRows, SelectionScene, all_positions, highest


class DeviationOf(StrEnum):
    """Which rows are compared."""

    KEYS = "k"
    VALUES = "v"
    BOTH = "kv"


class DeviationAtOneLayer:
    """The tokens whose KV changed most at one check layer; all tokens are computed up to it.

    Source: the code of CacheBlend (values) and of LMCache (keys). `kv` adds both, each over its mean.
    """

    meets_coverage = False

    def __init__(self, of: DeviationOf = DeviationOf.VALUES, check_layer: int = 1) -> None:
        self._of = of
        self._check_layer = check_layer

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self._of}-deviation"

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return all positions, or none where the budget is zero."""
        positions = all_positions(scene)
        return positions if scene.budget else positions[:0]

    def narrow(self, scene: SelectionScene, layer: int, chosen: Tensor, fresh: FreshRows) -> Tensor | None:
        """Return the budget's largest deviations at the check layer."""
        if layer != self._check_layer:
            return None
        return _largest(scene, chosen, _score(fresh.deviation(), self._of), scene.budget)


class GradualFiltering:
    """The tokens whose KV changed most, filtered layer by layer from more than the budget down to less.

    All tokens pass the first layer; the number that goes on from each of the next `layers` falls in equal steps from
    `widest` times the budget, such that the mean over all filtered layers and those behind is the budget.

    Source: CacheBlend, arXiv 2405.16444, section 4.3; the paper gives no schedule, this one is ours.
    """

    name = "gradual"
    meets_coverage = False

    def __init__(
        self,
        num_layers: int,
        of: DeviationOf = DeviationOf.BOTH,
        first_layer: int = 1,
        layers: int = 8,
        widest: float = 1.5,
    ) -> None:
        self._of = of
        self._first_layer = first_layer
        steps = max(1, min(layers, num_layers - first_layer))
        behind = num_layers - first_layer - steps
        # shares fall linearly from `widest` to `last`, which then holds: mean over all of them is 1
        last = (steps + behind - widest * steps / 2) / (steps / 2 + behind) if steps / 2 + behind else 1.0
        span = max(steps - 1, 1)
        self._shares = [widest + (last - widest) * step / span for step in range(steps)]

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return all positions, or none where the budget is zero."""
        positions = all_positions(scene)
        return positions if scene.budget else positions[:0]

    def narrow(self, scene: SelectionScene, layer: int, chosen: Tensor, fresh: FreshRows) -> Tensor | None:
        """Return this layer's share of the budget with the largest deviations."""
        step = layer - self._first_layer
        if not 0 <= step < len(self._shares):
            return None
        budget = min(round(scene.budget * self._shares[step]), len(chosen))
        return _largest(scene, chosen, _score(fresh.deviation(), self._of), budget)


def _score(deviation: Deviation, of: DeviationOf) -> Tensor:
    if of is DeviationOf.KEYS:
        return deviation.keys
    if of is DeviationOf.VALUES:
        return deviation.values
    keys, values = deviation
    return keys / keys.mean().clamp_min(1e-30) + values / values.mean().clamp_min(1e-30)


def _largest(scene: SelectionScene, chosen: Tensor, scores: Tensor, budget: int) -> Tensor:
    spread = scores.new_zeros(scene.spans[-1].stop)
    spread[chosen] = scores
    outside = scores.new_full((scene.spans[-1].stop,), True, dtype=torch.bool)
    outside[chosen] = False
    spread[outside] = -1.0  # distances are not negative, so these come after every chosen one
    kept = torch.zeros_like(outside)
    kept[highest(scene, spread, budget)] = True
    return kept[chosen]
