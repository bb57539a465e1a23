"""Exact search over the store's mapped vectors: one matrix product, no copy, no index to build or to keep.

A single question over 10^5 vectors takes what FAISS's Flat index takes (both read every vector once), without its
import and without a second copy in memory. It is also what every other index is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ragkit.errors import RetrievalError
from ragkit.retrieval.base import FloatMatrix, IdVector

# Scores held at a time: 64 MB.
_SCORES_AT_ONCE = 1 << 24


class FlatIndex:
    """Exact inner products with vectors that lie in several parts. Implements `VectorIndex`.

    Args:
        row_ids: (rows,) ascending ids of all parts together.
        parts: (rows, dim) matrices, memory-mapped or not, in the order of `row_ids`.

    Raises:
        RetrievalError: the parts do not hold one vector a row.
    """

    kind = "flat"

    def __init__(self, row_ids: IdVector, parts: Sequence[FloatMatrix]) -> None:
        if sum(len(part) for part in parts) != len(row_ids):
            raise RetrievalError(f"{sum(len(part) for part in parts)} vectors for {len(row_ids)} rows")
        self._row_ids = row_ids
        self._parts = [part for part in parts if len(part)]
        self._stops = np.cumsum([len(part) for part in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._row_ids)

    def search(self, queries: FloatMatrix, k: int, allowed: IdVector | None = None) -> tuple[FloatMatrix, IdVector]:
        """Return scores and row ids, (queries, min(k, rows)), best first, equal scores by row id."""
        positions = None if allowed is None else positions_of(self._row_ids, allowed)
        found = min(k, len(self._row_ids) if positions is None else len(positions))
        scores = np.empty((len(queries), found), dtype=np.float32)
        row_ids = np.empty((len(queries), found), dtype=np.int64)
        step = max(1, _SCORES_AT_ONCE // max(1, len(self._row_ids)))
        for start in range(0, len(queries), step):
            products = self._products(queries[start : start + step], positions)
            for row, values in enumerate(products, start):
                best = top_positions(values, found)
                scores[row] = values[best]
                row_ids[row] = self._row_ids[best if positions is None else positions[best]]
        return scores, row_ids

    def similarities(self, query: FloatMatrix, row_ids: IdVector) -> NDArray[np.float32]:
        """Return the inner products of one query (1, dim) with the vectors of these rows, in their order."""
        order = np.argsort(row_ids)
        result = np.empty(len(row_ids), dtype=np.float32)
        if len(row_ids):
            result[order] = self.take(positions_of(self._row_ids, row_ids[order])) @ query[0]
        return settled(result)

    def take(self, places: NDArray[np.int64]) -> FloatMatrix:
        """Return a copy of the vectors at these ascending places among the rows."""
        pieces = []
        borders = np.searchsorted(places, self._stops)
        for number, part in enumerate(self._parts):
            first = self._stops[number] - len(part)
            start = borders[number - 1] if number else 0
            pieces.append(part[places[start : borders[number]] - first])
        return np.concatenate(pieces) if pieces else np.empty((0, 0), dtype=np.float32)

    def _products(self, queries: FloatMatrix, places: NDArray[np.int64] | None) -> FloatMatrix:
        if places is not None and len(places) < len(self) // 8:
            return settled(queries @ self.take(places).T)
        products = np.empty((len(queries), len(self._row_ids)), dtype=np.float32)
        start = 0
        for part in self._parts:
            stop = start + len(part)
            # one question: matrix times vector, which reads the part once and needs no transposed copy
            products[:, start:stop] = (part @ queries[0])[None] if len(queries) == 1 else queries @ part.T
            start = stop
        return settled(products if places is None else products[:, places])


def settled(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return cosines rounded to multiples of 2^-20 (1e-6), so that equal vectors score equally.

    The same row gives sums that differ in the last bits by its place in a matrix and by the shape of the batch.
    """
    rounded: NDArray[np.float32] = np.rint(scores * np.float32(1 << 20)) * np.float32(2.0**-20)
    return rounded


def positions_of(row_ids: IdVector, wanted: IdVector) -> NDArray[np.int64]:
    """Return where the `wanted` ids stand in `row_ids` (both ascending); ids that are not there are left out."""
    places = np.searchsorted(row_ids, wanted)
    places = places[places < len(row_ids)]
    found: NDArray[np.int64] = places[row_ids[places] == wanted[: len(places)]]
    return found


def top_positions(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the positions of the `k` largest values, best first; equal values by position, also at the border."""
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    if k < len(values):
        border = np.partition(values, len(values) - k)[len(values) - k]
        candidates = np.flatnonzero(values >= border)
    else:
        candidates = np.arange(len(values))
    best: NDArray[np.int64] = candidates[np.lexsort((candidates, -values[candidates]))][:k]
    return best
