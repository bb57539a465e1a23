"""Vector store queries of LlamaIndex over a store: which rows may be found, their ranking, and the nodes they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)

from ragkit.config import RetrievalConfig
from ragkit.errors import UsageError
from ragkit.integrations.llama_index_filters import exact_filters, matches
from ragkit.integrations.llama_index_nodes import chunk_node
from ragkit.integrations.llama_index_records import NODE_ID, node_of, source_uri, unit
from ragkit.retrieval.base import IdVector, VectorIndex
from ragkit.retrieval.bm25 import TermSelection, search_bm25
from ragkit.retrieval.flat import FlatIndex, positions_of
from ragkit.retrieval.fusion import Ranked, score_fusion
from ragkit.retrieval.indexes import open_index
from ragkit.store import Store
from ragkit.store.base import StoredChunk

_BY_WORDS = frozenset({VectorStoreQueryMode.TEXT_SEARCH, VectorStoreQueryMode.SPARSE})
_MODES = ("default", "text_search", "sparse", "hybrid", "mmr")
_MMR_PREFETCH = 4
_SCANNED_AT_ONCE = 1024

Ranking = list[tuple[int, float]]  # (row id, score), best first


class NodeSearch:
    """Searches one store. Safe to use from threads; follows the store's generation.

    Attributes:
        store: what is searched.
    """

    def __init__(self, store: Store, config: RetrievalConfig) -> None:
        self.store = store
        self._config = config
        self._loading = threading.Lock()
        self._index: tuple[int, VectorIndex] | None = None

    def query(self, query: VectorStoreQuery, options: Mapping[str, Any]) -> VectorStoreQueryResult:
        """Return the nodes that fit best.

        Raises:
            UsageError: the mode is none of the store's, or the query lacks what its mode needs.
        """
        if query.mode.value not in _MODES:
            raise UsageError(f"a ragkit store has no query mode {query.mode.value!r}; it has {', '.join(_MODES)}")
        if query.embedding_field is not None:
            raise UsageError(f"a node has one vector here, and the query asks for {query.embedding_field!r}")
        with self.store.snapshot() as generation:
            allowed = self._allowed(query.node_ids, query.doc_ids, query.filters)
            ranking = self._rank(query, generation, allowed, options) if allowed is None or len(allowed) else []
            most = query.hybrid_top_k if query.mode is VectorStoreQueryMode.HYBRID else None
            return self._result(ranking, query, most or query.similarity_top_k)

    def nodes(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[BaseNode]:
        """Return the nodes with these ids that fulfil the filters."""
        with self.store.snapshot():
            rows = self._allowed(node_ids, None, filters)
            wanted = _predicate(node_ids, None, filters)
            return [
                node
                for stored in self._stored(self.store.row_ids() if rows is None else rows)
                for node in self._nodes_of(stored)
                if wanted(node)
            ]

    def _rank(
        self, query: VectorStoreQuery, generation: int, allowed: IdVector | None, options: Mapping[str, Any]
    ) -> Ranking:
        top = query.similarity_top_k
        if query.mode in _BY_WORDS:
            return self._by_words(query, query.sparse_top_k or top, allowed).pairs()
        if query.query_embedding is None:
            raise UsageError(f"a query of mode {query.mode.value} needs an embedding, and this one has none")
        vector = unit(query.query_embedding, "the query's embedding")
        index = self._index_at(generation)
        dim = self.store.meta.dim
        if vector.shape[1] != dim:
            raise UsageError(
                f"the query's embedding has {vector.shape[1]} dimensions, and the store's vectors, made by "
                f"{self.store.meta.embedder_id}, have {dim}: embed questions with the same model"
            )
        many = top * _MMR_PREFETCH if query.mode is VectorStoreQueryMode.MMR else top
        scores, row_ids = index.search(vector, many, allowed)
        if query.mode is VectorStoreQueryMode.DEFAULT:
            return Ranked(row_ids[0], scores[0]).pairs()
        if query.mode is VectorStoreQueryMode.MMR:
            return self._diverse(query, vector, row_ids[0], options)
        words = self._by_words(query, query.sparse_top_k or top, allowed)
        weight = self._config.dense_weight if query.alpha is None else query.alpha
        if not 0 <= weight <= 1:
            raise UsageError(f"alpha must lie in [0, 1], got {weight}")
        only_words = np.setdiff1d(words.row_ids, row_ids[0])
        dense = Ranked(
            np.concatenate([row_ids[0], only_words]),
            np.concatenate([scores[0], index.similarities(vector, only_words)]),
            weight,
        )
        return score_fusion([dense, Ranked(words.row_ids, words.scores, 1 - weight)])

    def _by_words(self, query: VectorStoreQuery, most: int, allowed: IdVector | None) -> Ranked:
        if not query.query_str:
            raise UsageError(f"a query of mode {query.mode.value} needs its text, and this one has none")
        chunks = len(self.store.row_ids())
        selection = TermSelection(common_share=self._config.common_share)
        scores, row_ids = search_bm25(self.store, query.query_str, most, chunks, allowed, selection)
        return Ranked(row_ids, scores)

    def _diverse(self, query: VectorStoreQuery, vector: Any, row_ids: IdVector, options: Mapping[str, Any]) -> Ranking:
        threshold = options.get("mmr_threshold", query.mmr_threshold)
        table = self.store.vectors()
        exact = FlatIndex(table.row_ids, [part.vectors for part in table.parts])
        ordered = np.sort(row_ids)
        vectors = exact.take(positions_of(table.row_ids, ordered))
        scores, chosen = get_top_k_mmr_embeddings(
            vector[0].tolist(),
            vectors.tolist(),
            similarity_top_k=query.similarity_top_k,
            embedding_ids=ordered.tolist(),
            mmr_threshold=threshold,
        )
        return list(zip(chosen, map(float, scores), strict=True))

    def _result(self, ranking: Ranking, query: VectorStoreQuery, most: int) -> VectorStoreQueryResult:
        wanted = _predicate(query.node_ids, query.doc_ids, query.filters)
        scores = dict(ranking)
        nodes: list[BaseNode] = []
        similarities: list[float] = []
        for stored in self._stored([row_id for row_id, _ in ranking[:most]]):
            for node in self._nodes_of(stored):
                if wanted(node):
                    nodes.append(node)
                    similarities.append(scores[stored.row_id])
        nodes, similarities = nodes[:most], similarities[:most]
        return VectorStoreQueryResult(nodes, similarities, [node.node_id for node in nodes])

    def _allowed(
        self, node_ids: list[str] | None, doc_ids: list[str] | None, filters: MetadataFilters | None
    ) -> IdVector | None:
        """Return the rows that hold a node which may be found, ascending; None where all do."""
        limits = [self.store.rows_where({key: value}) for key, value in exact_filters(filters).items()]
        if node_ids:
            limits.append(self._rows_of_ids(node_ids))
        if doc_ids:
            limits.append(_union([self.store.rows_where({"uri": _literal(uri)}) for uri in _sources(doc_ids)]))
        if filters is None or not filters.filters:
            return _intersection(limits) if limits else None
        wanted = _predicate(node_ids, doc_ids, filters)
        rows = _intersection(limits) if limits else self.store.row_ids()
        kept = [stored.row_id for stored in self._stored(rows) if any(map(wanted, self._nodes_of(stored)))]
        return np.array(kept, dtype=np.int64)

    def _rows_of_ids(self, node_ids: Sequence[str]) -> IdVector:
        chunks = self.store.known_chunks(list(node_ids))
        found = [self.store.rows_where({NODE_ID: node_id}) for node_id in node_ids if node_id not in chunks]
        rows = [stored.row_id for stored in self.store.chunks_by_id(sorted(chunks))]
        return _union([*found, np.array(rows, dtype=np.int64)])

    def _stored(self, rows: Sequence[int] | IdVector) -> Iterator[StoredChunk]:
        for start in range(0, len(rows), _SCANNED_AT_ONCE):
            yield from self.store.chunks(rows[start : start + _SCANNED_AT_ONCE])

    def _nodes_of(self, stored: StoredChunk) -> list[BaseNode]:
        """Return the nodes that a chunk is: those of LlamaIndex with its text, or itself where ragkit ingested it."""
        if NODE_ID not in stored.metadata:
            return [chunk_node(stored.chunk, stored.uri, stored.metadata)]
        found = (node_of(link, stored.chunk.text) for link in self.store.links(stored.chunk.doc_id))
        return [node for node in found if node is not None]

    def _index_at(self, generation: int) -> VectorIndex:
        with self._loading:
            if self._index is None or self._index[0] != generation:
                self._index = (generation, open_index(self.store, self._config))
            return self._index[1]


def _predicate(
    node_ids: list[str] | None, doc_ids: list[str] | None, filters: MetadataFilters | None
) -> Callable[[BaseNode], bool]:
    return lambda node: (
        (not node_ids or node.node_id in node_ids)
        and (not doc_ids or node.ref_doc_id in doc_ids)
        and matches(node.metadata, filters)
    )


def _sources(doc_ids: Sequence[str]) -> Iterator[str]:
    for doc_id in doc_ids:
        yield source_uri(doc_id)
        yield doc_id


def _literal(uri: str) -> str:
    """Return a URI as a glob that means it alone."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in uri)


def _union(parts: Sequence[IdVector]) -> IdVector:
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)


def _intersection(parts: Sequence[IdVector]) -> IdVector:
    rows = parts[0]
    for part in parts[1:]:
        rows = np.intersect1d(rows, part, assume_unique=True)
    return rows
