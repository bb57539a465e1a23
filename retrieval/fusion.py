"""Two ranked lists become one.

Score fusion: a convex combination of the legs' scores, each scaled by its leg's best one with zero as the least
possible (Bruch, Gai and Ingber, An Analysis of Fusion Functions for Hybrid Retrieval, TOIS 2023, find convex
combinations ahead of reciprocal ranks too). Reciprocal rank fusion: Cormack, Clarke and Buettcher, SIGIR 2009.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ragkit.retrieval.base import IdVector


@dataclass(frozen=True, slots=True)
class Ranked:
    """One list, best first: (hits,) row ids and scores, higher is better. `weight` is its say in the fusion."""

    row_ids: IdVector
    scores: NDArray[np.float32]
    weight: float = 1.0

    def pairs(self) -> list[tuple[int, float]]:
        """Return (row id, score), best first."""
        return list(zip(self.row_ids.tolist(), self.scores.tolist(), strict=True))


def score_fusion(lists: Sequence[Ranked]) -> list[tuple[int, float]]:
    """Return (row id, score), best first; equal scores by row id.

    A hit's score is the weighted sum of its score in each list over that list's best one; a list that does not hold
    it, or says less than nothing for it, adds nothing. With weights that sum to one, 1 is the best of every list.
    """
    fused: dict[int, float] = {}
    for ranked in lists:
        best = float(ranked.scores.max(initial=0.0))
        for row_id, score in ranked.pairs():
            share = max(0.0, score) / best if best > 0 else 0.0
            fused[row_id] = fused.get(row_id, 0.0) + ranked.weight * share
    return best_first(fused)


def reciprocal_rank_fusion(lists: Sequence[Ranked], k: int = 60) -> list[tuple[int, float]]:
    """Return (row id, score), best first; equal scores by row id.

    A hit's score is the weighted sum over the lists of 1 / (k + rank), ranks from 1; a list that does not hold it adds
    nothing.
    """
    fused: dict[int, float] = {}
    for ranked in lists:
        for rank, row_id in enumerate(ranked.row_ids.tolist(), 1):
            fused[row_id] = fused.get(row_id, 0.0) + ranked.weight / (k + rank)
    return best_first(fused)


def best_first(scores: Mapping[int, float]) -> list[tuple[int, float]]:
    """Return the items by falling score, equal scores by row id."""
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
