"""Selectors that look at positions only: everything, none, random, and the first tokens of each chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.kvcache.token_selection import ChosenOnce, SelectionScene, all_positions, highest


class Everything(ChosenOnce):
    """Every token, whatever the budget: the blend that equals full prefill."""

    name = "everything"

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return all positions."""
        return all_positions(scene)


class NoTokens(ChosenOnce):
    """No token: plain reuse."""

    name = "none"

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return no position."""
        return torch.empty(0, dtype=torch.int64, device=scene.device)


class RandomTokens(ChosenOnce):
    """Tokens by chance, the same for the same prompt shape and seed."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return `budget` positions by chance."""
        generator = torch.Generator().manual_seed(self._seed)
        return highest(scene, torch.rand(scene.spans[-1].stop, generator=generator).to(scene.device), scene.budget)


class FirstTokens(ChosenOnce):
    """The first tokens of each chunk, whose reused KV took them for the start of the text.

    Source: LegoLink of EPIC, arXiv 2410.15332; there the number is fixed, here it follows from the budget unless given.
    """

    name = "first"

    def __init__(self, tokens_per_chunk: int = 0) -> None:
        self._tokens_per_chunk = tokens_per_chunk

    def choose(self, scene: SelectionScene) -> Tensor:
        """Return the first positions of each chunk that is not exact."""
        if self._tokens_per_chunk:
            parts = [
                torch.arange(span.start, min(span.start + self._tokens_per_chunk, span.stop), device=scene.device)
                for span in scene.spans
                if not span.is_exact
            ]
            return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=scene.device)
        # The nearer to its chunk's start, the higher: all chunks share equally, and what short ones leave goes on.
        scores = torch.zeros(scene.spans[-1].stop, device=scene.device)
        for span in scene.spans:
            scores[span.start : span.stop] = -torch.arange(span.stop - span.start, device=scene.device).float()
        return highest(scene, scores, scene.budget)
