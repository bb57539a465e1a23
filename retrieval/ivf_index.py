"""FAISS's inverted file index: vectors by their nearest centroid, of which a search reads only a few lists.

Row ids are FAISS's own int64 ids, which the store never uses twice. (An id map around an inverted file aborts the
process at the second removal, and graph indexes cannot remove at all.) A GPU index is a copy of the CPU one.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.errors import RetrievalError
from ragkit.retrieval.base import FloatMatrix, IdVector
from ragkit.retrieval.faiss_flat import GPU_MAX_K, order_ties
from ragkit.retrieval.faiss_runtime import import_faiss, to_device
from ragkit.retrieval.flat import FlatIndex, positions_of

# Up to so many allowed rows, reading them all is exact and quicker than filtering lists.
EXACT_FILTER_ROWS = 50_000


class IvfIndex:
    """An inverted file index over a store's vectors. Implements `VectorIndex`.

    Args:
        index: a trained `faiss.IndexIVF` on the CPU that holds exactly the rows of `exact`.
        exact: the exact twin over the mapped vectors; it serves small filters.
        nprobe: how many lists a search reads.
        device: cpu, cuda or cuda:N.
    """

    def __init__(self, index: Any, exact: FlatIndex, nprobe: int, device: str = "cpu") -> None:
        if index.ntotal != len(exact):
            raise RetrievalError(f"the index holds {index.ntotal} rows, the store {len(exact)}; ingest makes it again")
        self._faiss = import_faiss(device)
        self._exact = exact
        self._nprobe = nprobe
        self._index = to_device(index, device)
        self._on_gpu = device != "cpu"
        self._mutex = threading.Lock()  # GPU resources serve one thread at a time
        self.kind = f"ivf-{device}"

    def __len__(self) -> int:
        return len(self._exact)

    def similarities(self, query: FloatMatrix, row_ids: IdVector) -> NDArray[np.float32]:
        """Return the inner products of one query (1, dim) with the vectors of these rows, from the exact twin."""
        return self._exact.similarities(query, row_ids)

    def search(self, queries: FloatMatrix, k: int, allowed: IdVector | None = None) -> tuple[FloatMatrix, IdVector]:
        """Return scores and row ids, (queries, min(k, hits)), best first, equal scores by row id.

        Where the lists that are read hold too few rows for a query, more lists are read.
        """
        wanted = min(k, len(self))
        filtered = allowed is not None and (self._on_gpu or len(allowed) <= EXACT_FILTER_ROWS)
        if filtered or not wanted or (self._on_gpu and wanted > GPU_MAX_K):
            return self._exact.search(queries, k, allowed)
        if allowed is not None:
            wanted = min(wanted, len(allowed))
        contiguous = np.ascontiguousarray(queries, dtype=np.float32)
        nprobe = self._nprobe
        while True:
            scores, row_ids = self._search(contiguous, wanted, nprobe, allowed)
            if (row_ids >= 0).all() or nprobe >= self._index.nlist:
                return order_ties(scores, row_ids)
            nprobe = min(4 * nprobe, self._index.nlist)

    def _search(
        self, queries: FloatMatrix, k: int, nprobe: int, allowed: IdVector | None
    ) -> tuple[FloatMatrix, IdVector]:
        options: dict[str, Any] = {"nprobe": nprobe}
        if allowed is not None:
            options["sel"] = self._faiss.IDSelectorBatch(allowed)
        with self._mutex:
            parameters = self._faiss.SearchParametersIVF(**options)
            scores, row_ids = self._index.search(queries, k, params=parameters)
        return scores, row_ids


def stored_row_ids(index: Any) -> IdVector:
    """Return the ids that an inverted file index holds, ascending."""
    faiss = import_faiss()
    lists = index.invlists
    ids = [
        faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number)).astype(np.int64)
        for number in range(lists.nlist)
        if lists.list_size(number)
    ]
    return np.sort(np.concatenate(ids)) if ids else np.empty(0, dtype=np.int64)


def bring_up_to_date(index: Any, row_ids: IdVector, exact: FlatIndex) -> int:
    """Remove from a CPU index what the store no longer holds, add what it lacks, and return how many rows changed.

    Ids are compared first: adding an id that is there already would store it twice.
    """
    faiss = import_faiss()
    held = stored_row_ids(index)
    gone = np.setdiff1d(held, row_ids, assume_unique=True)
    new = np.setdiff1d(row_ids, held, assume_unique=True)
    if len(gone):
        index.remove_ids(faiss.IDSelectorBatch(gone))
    add_rows(index, new, positions_of(row_ids, new), exact)
    return len(gone) + len(new)


def add_rows(index: Any, row_ids: IdVector, places: NDArray[np.int64], exact: FlatIndex) -> None:
    """Add the vectors that stand at `places` of `exact` under `row_ids`, 64K at a time."""
    for start in range(0, len(row_ids), 1 << 16):
        stop = start + (1 << 16)
        index.add_with_ids(exact.take(places[start:stop]), row_ids[start:stop])
