"""Rows whose chunks are retrieved beside generation and ahead of it, a window of questions at a time."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragkit.answers.base import RankedChunk
from ragkit.answers.options import QueryOptions, query_options
from ragkit.answers.steps import ordered_timings, ranked, refused
from ragkit.config import SearchMode
from ragkit.errors import StoreError
from ragkit.jobs.rows import QuestionRow, RowError, RowOutcome

if TYPE_CHECKING:
    from ragkit.parts import Parts
    from ragkit.retrieval.base import FloatMatrix

logger = logging.getLogger(__name__)

WINDOW_ROWS = 64  # questions that are embedded in one call
_WINDOWS_AHEAD = 2
# What is wrong with the store or the machine is no row's fault: the job ends, and goes on when it is started again.
NOT_OF_A_ROW = (StoreError, OSError, MemoryError)


@dataclass(frozen=True, slots=True)
class FoundRow:
    """A row whose chunks are retrieved, and what that took."""

    row: QuestionRow
    options: QueryOptions
    hits: tuple[RankedChunk, ...]
    generation: int
    retrieve_ms: float


@dataclass(frozen=True, slots=True)
class PagedRow:
    """A row that reads a document whole: it is answered after the batch, beside others of the same document."""

    row: QuestionRow
    options: QueryOptions
    doc_id: str

    @property
    def group(self) -> tuple[str, str]:
        """What its pages are named by: rows of one group are answered over the same ones."""
        return self.doc_id, self.options.generation.system_prompt


RetrievedRow = FoundRow | PagedRow | RowOutcome


class RowRetrieval:
    """Retrieves for rows, one window after the other. A context manager: leaving it ends what it has begun."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._latest: Future[list[RetrievedRow]] | None = None
        self._is_left = False
        self._paged: dict[Hashable, str | None] = {}  # what was found out about documents that rows name
        _ = parts.retriever  # what cannot be loaded is no row's fault

    def __enter__(self) -> RowRetrieval:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_left = True
        if self._latest is not None:
            wait((self._latest,))

    def run(self, rows: Iterator[QuestionRow]) -> Iterator[RetrievedRow]:
        """Yield every row with its chunks, in order, while the thread works on the next windows."""
        futures: deque[Future[list[RetrievedRow]]] = deque()
        while True:
            window = list(itertools.islice(rows, WINDOW_ROWS))
            if window:
                futures.append(self._begin(window))
            if not window or len(futures) > _WINDOWS_AHEAD:
                if not futures:
                    return
                yield from futures.popleft().result()

    def _begin(self, window: Sequence[QuestionRow]) -> Future[list[RetrievedRow]]:
        """Retrieve for a window behind the one before it, in a thread that ends with it.

        Embedding many questions uses all processors. A thread that has done so keeps a team of OpenMP's until it ends,
        beside which the model's own threads sleep between any two operations: generation took half as long again.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="ragkit-batch")
        self._latest = pool.submit(self._window_behind, self._latest, window)
        pool.shutdown(wait=False)
        return self._latest

    def _window_behind(
        self, before: Future[list[RetrievedRow]] | None, window: Sequence[QuestionRow]
    ) -> list[RetrievedRow]:
        if before is not None:
            wait((before,))
        return [] if self._is_left else self._window(window)

    def _window(self, window: Sequence[QuestionRow]) -> list[RetrievedRow]:
        started = time.perf_counter()
        vectors = self._embedded([row.question for row in window])
        share = 1e3 * (time.perf_counter() - started) / len(window)
        steps: list[RetrievedRow] = []
        for index, row in enumerate(window):
            if row.error is not None:
                steps.append(RowOutcome(row, error=row.error))
                continue
            try:
                steps.append(self._retrieved(row, None if vectors is None else vectors[index : index + 1], share))
            except NOT_OF_A_ROW:
                raise
            except Exception as error:
                steps.append(failed(row, error))
        return steps

    def _embedded(self, questions: list[str]) -> FloatMatrix | None:
        """Return the vectors of the questions; None where none are needed, or where one of them cannot be embedded."""
        if self._parts.config.retrieval.mode is SearchMode.BM25:
            return None
        try:
            return self._parts.retriever.embed(questions)
        except NOT_OF_A_ROW:
            raise
        except Exception as error:
            logger.info("questions are embedded one by one: %s", error)
            return None

    def _retrieved(self, row: QuestionRow, vector: FloatMatrix | None, embed_ms: float) -> RetrievedRow:
        from ragkit.answers.confidence import judge
        from ragkit.request import check_question

        parts = self._parts
        check_question(row.question)
        options = query_options(parts, row.changes)
        doc_id = self._paged_id(options)
        if doc_id is not None:
            return PagedRow(row, options, doc_id)
        started = time.perf_counter()
        found = parts.retriever.retrieve(
            row.question, options.retrieval.k, options.retrieval_filters or None, vector=vector
        )
        hits = ranked(found.chunks)
        retrieve_ms = embed_ms + 1e3 * (time.perf_counter() - started)
        if not judge(row.question, hits, parts.embedder, options.answers).found:
            laps = {"retrieve": retrieve_ms, "first_token": retrieve_ms}
            return RowOutcome(row, refused(options, ordered_timings(laps, 0.0, retrieve_ms)))
        return FoundRow(row, options, hits, found.generation, retrieve_ms)

    def _paged_id(self, options: QueryOptions) -> str | None:
        """Return the id of the document that is read whole, looked for once for all rows that name it alike."""
        from ragkit.request import paged_document

        generation = options.generation
        asked = generation.strategy, options.document, bool(options.filters), generation.max_new_tokens
        if asked not in self._paged:
            whole = paged_document(self._parts, options)
            self._paged[asked] = None if whole is None else whole.document.doc_id
        return self._paged[asked]


def failed(row: QuestionRow, error: Exception) -> RowOutcome:
    """Return the outcome of a row that `error` stopped."""
    failure = RowError.of(error)
    if failure.code == "internal":
        logger.warning("row %s: this is a bug in ragkit: %s", row.row_id, failure.message, exc_info=error)
    return RowOutcome(row, error=failure)
