"""Two ranked lists become one.

Reciprocal rank fusion: Cormack, Clarke and Buettcher, SIGIR 2009. A hit's score is the sum over the lists of
1 / (k + rank), ranks from 1; a list that does not hold it adds nothing.
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


def reciprocal_rank_fusion(lists: Sequence[Ranked], k: int = 60) -> list[tuple[int, float]]:
    """Return (row id, score), best first; equal scores by row id."""
    fused: dict[int, float] = {}
    for ranked in lists:
        for rank, row_id in enumerate(ranked.row_ids.tolist(), 1):
            fused[row_id] = fused.get(row_id, 0.0) + ranked.weight / (k + rank)
    return best_first(fused)


def weighted_score_fusion(lists: Sequence[Ranked]) -> list[tuple[int, float]]:
    """Return (row id, score), best first: the weighted sum of each list's scores, scaled to [0, 1] within the list.

    A list that does not hold a hit adds nothing, as its own last hit does.
    """
    fused: dict[int, float] = {}
    for ranked in lists:
        if not len(ranked.scores):
            continue
        low, high = float(ranked.scores.min()), float(ranked.scores.max())
        span = high - low or 1.0
        for row_id, score in zip(ranked.row_ids.tolist(), ranked.scores.tolist(), strict=True):
            scaled = (score - low) / span if high > low else 1.0
            fused[row_id] = fused.get(row_id, 0.0) + ranked.weight * scaled
    return best_first(fused)


def best_first(scores: Mapping[int, float]) -> list[tuple[int, float]]:
    """Return the items by falling score, equal scores by row id."""
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
