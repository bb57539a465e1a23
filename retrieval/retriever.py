"""From a question to ranked chunks: both legs at once, then fusion, then selection.

The dense leg (embedding, then vectors) runs in a thread of its own while the BM25 leg reads SQLite; numpy and SQLite
both work without the interpreter's lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ragkit.config import FusionMethod, RetrievalConfig, SearchMode
from ragkit.errors import UsageError
from ragkit.retrieval.base import Embedder, FloatMatrix, IdVector, SearchableStore, VectorIndex
from ragkit.retrieval.bm25 import TermSelection, search_bm25
from ragkit.retrieval.fusion import Ranked, reciprocal_rank_fusion, score_fusion
from ragkit.retrieval.indexes import open_index
from ragkit.retrieval.selection import select_distinct
from ragkit.retrieval.stopwatch import Stopwatch
from ragkit.types import MetadataValue, SearchHit

if TYPE_CHECKING:
    from ragkit.store.base import StoredChunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetrievedChunk:
    """One retrieved chunk with what each leg said about it.

    Attributes:
        stored: the chunk, its row id, its URI and metadata.
        score: the fused score that ranked it, from 0 to 1 in score fusion; in a search of one leg that leg's own score.
        dense: cosine similarity of question and chunk; None in a search by BM25 alone.
        bm25: BM25 score, or None where the BM25 leg did not return it.
        rank: 1-based.
    """

    stored: StoredChunk
    score: float
    dense: float | None
    bm25: float | None
    rank: int


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What one search found.

    Attributes:
        chunks: best first.
        generation: the store's generation that was read.
        timings_ms: embed, dense, bm25, fuse, chunks and retrieve (all in); of the legs that ran. The legs overlap.
    """

    chunks: tuple[RetrievedChunk, ...]
    generation: int
    timings_ms: Mapping[str, float]


class Retriever:
    """Searches one store. Safe to use from threads; follows the store's generation.

    Args:
        store: what is searched.
        embedder: the one that the store's vectors were made with.
        config: mode, number of hits and candidates, fusion, and the size up to which search is exact.
        device: where a FAISS index lives: cpu or cuda.
    """

    def __init__(
        self, store: SearchableStore, embedder: Embedder, config: RetrievalConfig, device: str = "cpu"
    ) -> None:
        self._store = store
        self._embedder = embedder
        self._config = config
        self._device = device
        self._selection = TermSelection(common_share=config.common_share)
        self._index: tuple[int, VectorIndex] | None = None
        self._chunk_count: tuple[int, int] | None = None
        self._loading = threading.Lock()
        self._dense_pool = ThreadPoolExecutor(thread_name_prefix="ragkit-dense")

    def search(
        self,
        question: str,
        k: int | None = None,
        filter: Mapping[str, MetadataValue] | None = None,
        mode: SearchMode | str | None = None,
    ) -> list[SearchHit]:
        """Return ids, scores and ranks of the best chunks for `question`; see `retrieve`."""
        found = self.retrieve(question, k, filter, mode)
        return [SearchHit(hit.stored.chunk.chunk_id, hit.score, hit.rank) for hit in found.chunks]

    def retrieve(
        self,
        question: str,
        k: int | None = None,
        filter: Mapping[str, MetadataValue] | None = None,
        mode: SearchMode | str | None = None,
        vector: FloatMatrix | None = None,
    ) -> Retrieval:
        """Return the best chunks for `question`, with scores and timings.

        Args:
            question: natural language or keywords.
            k: how many; the configuration's number where left out.
            filter: metadata that a chunk's document must have, applied before both legs search.
            mode: hybrid, dense or bm25; the configuration's where left out.
            vector: (1, dim) of the question where `embed` was asked for it already.

        Raises:
            UsageError: `k` is below 1 or there is no such mode.
            RetrievalError: embedding or searching failed.
        """
        wanted, chosen = self._checked(k, mode)
        candidates = max(self._config.candidates, 2 * wanted)
        watch = Stopwatch()
        with watch("retrieve"), self._store.snapshot() as generation:
            allowed = self._store.rows_where(filter) if filter else None
            legs = self._run_legs(_Asked(question, candidates, allowed, chosen, generation, vector), watch)
            with watch("fuse"):
                ranking = self._fuse(legs)
            with watch("chunks"):
                chunks = self._take(ranking, wanted, legs)
        return Retrieval(chunks, generation, watch.milliseconds)

    def embed(self, questions: Sequence[str]) -> FloatMatrix:
        """Return (questions, dim) vectors that `retrieve` takes one by one; many questions at once are quicker.

        Raises:
            RetrievalError: one of them cannot be embedded.
        """
        return self._embedder.encode_queries(questions)

    def close(self) -> None:
        """Let the index and the thread go."""
        self._dense_pool.shutdown(wait=False)
        self._index = None

    def _checked(self, k: int | None, mode: SearchMode | str | None) -> tuple[int, SearchMode]:
        wanted = self._config.k if k is None else k
        if wanted < 1:
            raise UsageError(f"k must be at least 1, got {wanted}")
        try:
            return wanted, SearchMode(self._config.mode if mode is None else mode)
        except ValueError as error:
            raise UsageError(f"there is no search mode {mode!r}; take one of {', '.join(SearchMode)}") from error

    def _run_legs(self, asked: _Asked, watch: Stopwatch) -> _Legs:
        """Return what each leg found. The store is read by this thread alone, within its snapshot."""
        legs = _Legs()
        if asked.allowed is not None and not len(asked.allowed):
            return legs
        vector: Future[FloatMatrix] | None = None
        dense: Future[Ranked] | None = None
        if asked.mode is not SearchMode.BM25:
            vector = self._dense_pool.submit(watch.timed, "embed", lambda: self._vector_of(asked))
            index = self._index_at(asked.generation)
            dense = self._dense_pool.submit(_search_dense, index, vector, asked, watch)
        if asked.mode is not SearchMode.DENSE:
            with watch("bm25"):
                chunks = self._chunks_at(asked.generation)
                most = min(asked.candidates, max(1, chunks))  # SQLite takes no number of over 64 bits
                scores, row_ids = search_bm25(self._store, asked.question, most, chunks, asked.allowed, self._selection)
            legs.bm25 = Ranked(row_ids, scores, 1 - self._config.dense_weight)
        if vector is not None and dense is not None:
            legs.dense = dense.result()
            legs.complete = self._complete(legs, index, vector.result())
        return legs

    def _vector_of(self, asked: _Asked) -> FloatMatrix:
        return self._embedder.encode_queries([asked.question]) if asked.vector is None else asked.vector

    def _complete(self, legs: _Legs, index: VectorIndex, query: FloatMatrix) -> Ranked | None:
        """Return the dense leg with its exact scores for what only the BM25 leg found; these are few rows."""
        if legs.dense is None or legs.bm25 is None:
            return legs.dense
        missing = np.setdiff1d(legs.bm25.row_ids, legs.dense.row_ids)
        return Ranked(
            np.concatenate([legs.dense.row_ids, missing]),
            np.concatenate([legs.dense.scores, index.similarities(query, missing)]),
            self._config.dense_weight,
        )

    def _fuse(self, legs: _Legs) -> list[tuple[int, float]]:
        if legs.dense is None or legs.bm25 is None or legs.complete is None:
            only = legs.dense or legs.bm25
            return only.pairs() if only else []
        if self._config.fusion is FusionMethod.SCORES:
            return score_fusion([legs.complete, legs.bm25])
        dense = replace(legs.dense, weight=self._config.dense_weight)
        return reciprocal_rank_fusion([dense, legs.bm25], self._config.rrf_k)

    def _take(self, ranking: list[tuple[int, float]], wanted: int, legs: _Legs) -> tuple[RetrievedChunk, ...]:
        """Return the first `wanted` different chunks, read from the store in as few steps as it takes."""
        dense = dict(legs.complete.pairs()) if legs.complete else {}
        bm25 = dict(legs.bm25.pairs()) if legs.bm25 else {}
        scores = dict(ranking)
        row_ids = [row_id for row_id, _ in ranking]
        kept: list[StoredChunk] = []
        for start in range(0, len(row_ids), wanted):
            kept = select_distinct(kept, self._store.chunks(row_ids[start : start + wanted]), wanted)
            if len(kept) == wanted:
                break
        return tuple(
            RetrievedChunk(stored, scores[stored.row_id], dense.get(stored.row_id), bm25.get(stored.row_id), rank)
            for rank, stored in enumerate(kept, 1)
        )

    def _index_at(self, generation: int) -> VectorIndex:
        with self._loading:
            if self._index is None or self._index[0] != generation:
                started = time.perf_counter()
                index = open_index(self._store, self._config, self._device)
                self._index = (generation, index)
                self._chunk_count = (generation, len(index))
                logger.debug("opened the index of generation %d in %.3f s", generation, time.perf_counter() - started)
            return self._index[1]

    def _chunks_at(self, generation: int) -> int:
        known = self._chunk_count  # read as one: a thread at another generation may replace it meanwhile
        if known is None or known[0] != generation:
            self._chunk_count = known = (generation, len(self._store.row_ids()))
        return known[1]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One search: `allowed` are the sorted row ids that pass the filter, None without one; so is a known `vector`."""

    question: str
    candidates: int
    allowed: IdVector | None
    mode: SearchMode
    generation: int
    vector: FloatMatrix | None


@dataclass(slots=True)
class _Legs:
    """What each leg found; `complete` is the dense leg with its scores for the other leg's hits."""

    dense: Ranked | None = None
    bm25: Ranked | None = None
    complete: Ranked | None = None


def _search_dense(index: VectorIndex, vector: Future[FloatMatrix], asked: _Asked, watch: Stopwatch) -> Ranked:
    query = vector.result()
    with watch("dense"):
        scores, row_ids = index.search(query, asked.candidates, asked.allowed)
    return Ranked(row_ids[0], scores[0])
