"""Selectors that ask which tokens the question looks at."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.kvcache.token_selection import (
    ChosenOnce,
    LayerRange,
    SelectionScene,
    enough_tokens,
    evenly_spaced,
    highest,
)

# Below, attention is about the text and not about the question; what is above adds little (both measured), and tokens
# are chosen while its KV is still on the way.
SCORED_LAYERS = LayerRange(1 / 2, 3 / 4)


class QuestionAttention(ChosenOnce):
    """The tokens that the question attends to most over the reused KV, and others evenly spaced.

    The evenly spaced ones measure how the KV changes everywhere: change propagation moves the rest by what they show.
    One for every `even_spacing` tokens is enough, as long as propagation reaches from one to the next.

    A coverage only settles how many are chosen; the tokens are those of a fixed budget of that many.

    Source: query-guided selection of FusionRAG, arXiv 2601.12904; the evenly spaced share is ours.

    Args:
        even_spacing: tokens for each that is spaced evenly.
        most_even: most of the budget that is spaced evenly, from 0 to 1.
        layers: whose attention counts.
    """

    name = "question"
    meets_coverage = True

    def __init__(self, even_spacing: float = 32.0, most_even: float = 0.5, layers: LayerRange = SCORED_LAYERS) -> None:
        self.layers = layers
        self._even_spacing = even_spacing
        self._most_even = most_even

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return the budget's positions."""
        scene = self.settled(scene)
        even = self._even(scene)
        if len(even) == scene.budget:
            return even
        return highest(scene, scene.question_mass(self.layers), scene.budget, even)

    def settled(self, scene: SelectionScene) -> SelectionScene:
        """Return the scene whose budget is what its coverage needs, or the scene itself where it asks for none."""
        if scene.coverage is None:
            return scene
        mass = scene.question_mass(self.layers)
        # Evenly spaced ones count as many as the largest budget has: of how many they are a share is not known yet.
        return _WithBudget(scene, enough_tokens(scene, scene.coverage, mass, self._even(scene)), mass)

    def _even(self, scene: SelectionScene) -> Tensor:
        tokens = scene.spans[-1].stop - scene.spans[0].start
        return evenly_spaced(scene, round(min(tokens / self._even_spacing, scene.budget * self._most_even)))


class TwoRounds(ChosenOnce):
    """Half of the budget by the question's attention over the reused KV, the rest over the KV repaired by the first.

    How large the budget is, a coverage settles before the first round.

    Args:
        first_share: part of the budget that the first round takes, the evenly spaced ones with it.
    """

    name = "two-rounds"
    meets_coverage = True

    def __init__(self, first_share: float = 0.5) -> None:
        self._first = QuestionAttention()
        self._first_share = first_share

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return the budget's positions."""
        scene = self._first.settled(scene)
        first = self._first.choose(_WithBudget(scene, round(scene.budget * self._first_share)))
        if len(first) == 0 or len(first) == scene.budget:
            return first if len(first) else highest(scene, scene.question_mass(self._first.layers), scene.budget)
        return highest(scene, scene.question_mass(self._first.layers, first), scene.budget, first)


class _WithBudget:
    """A scene with another budget, which is spent whole.

    Args:
        scene: the scene.
        budget: the other budget.
        mass: what the question attends to over the reused KV, where that is known.
    """

    coverage = None

    def __init__(self, scene: SelectionScene, budget: int, mass: Tensor | None = None) -> None:
        self._scene = scene
        self._mass = mass
        self.budget = budget
        self.spans = scene.spans
        self.device: torch.device = scene.device

    def question_mass(self, layers: LayerRange, repaired: Tensor | None = None) -> Tensor:
        """Return what the scene returns."""
        if self._mass is not None and repaired is None:
            return self._mass
        return self._scene.question_mass(layers, repaired)
