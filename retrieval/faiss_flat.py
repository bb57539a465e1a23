"""Exact search through FAISS: for a GPU, which reads 10^6 vectors in the time a CPU reads 10^4."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ragkit.retrieval.base import FloatMatrix, IdVector
from ragkit.retrieval.faiss_runtime import import_faiss, to_device
from ragkit.retrieval.flat import FlatIndex, settled

# GPU indexes give at most so many hits a query.
GPU_MAX_K = 2048


class FaissFlatIndex:
    """A copy of the vectors in FAISS's Flat index, on the CPU or a GPU. Implements `VectorIndex`.

    Filtered searches go to the exact CPU twin, which reads only the allowed rows: a GPU Flat index takes no filter.

    Args:
        row_ids: (rows,) ascending ids.
        parts: (rows, dim) matrices in the order of `row_ids`.
        dim: length of a vector.
        device: cpu, cuda or cuda:N.
    """

    def __init__(self, row_ids: IdVector, parts: Sequence[FloatMatrix], dim: int, device: str = "cpu") -> None:
        faiss = import_faiss(device)
        self._exact = FlatIndex(row_ids, parts)
        self._row_ids = row_ids
        # an empty index is copied and then filled, so that the vectors are never held twice in main memory
        self._index = to_device(faiss.IndexFlatIP(dim), device)
        for part in parts:
            if len(part):
                self._index.add(np.ascontiguousarray(part, dtype=np.float32))
        self._on_gpu = device != "cpu"
        self._mutex = threading.Lock()  # GPU resources serve one thread at a time
        self.kind = f"faiss-flat-{device}"

    def __len__(self) -> int:
        return len(self._row_ids)

    def similarities(self, query: FloatMatrix, row_ids: IdVector) -> NDArray[np.float32]:
        """Return the inner products of one query (1, dim) with the vectors of these rows, from the exact twin."""
        return self._exact.similarities(query, row_ids)

    def search(self, queries: FloatMatrix, k: int, allowed: IdVector | None = None) -> tuple[FloatMatrix, IdVector]:
        """Return scores and row ids, (queries, min(k, rows)), best first, equal scores by row id."""
        wanted = min(k, len(self))
        if allowed is not None or not wanted or (self._on_gpu and wanted > GPU_MAX_K):
            return self._exact.search(queries, k, allowed)
        with self._mutex:
            scores, places = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), wanted)
        return order_ties(scores, self._row_ids[places])


def order_ties(scores: FloatMatrix, row_ids: IdVector) -> tuple[FloatMatrix, IdVector]:
    """Return both matrices with each row by falling score, as `settled` rounds it, and equal scores by row id."""
    scores = settled(scores)
    order = np.lexsort((row_ids, -scores), axis=-1)
    return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(row_ids, order, axis=-1)
