"""Ingest: plan, read, chunk, embed, commit. Everything that is reported as done is committed.

A commit group holds one large source or many small ones. Until its transaction the store shows the old state of each
of its sources, so a crash costs at most the group at hand, and the same command goes on with the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from threading import Event

import numpy as np

from ragkit.chunking.base import Chunker, check_chunks
from ragkit.chunking.metadata import with_metadata
from ragkit.errors import ChunkingError, ReadError, RetrievalError
from ragkit.jobs.plan import Action, IngestPlan, PlannedSource, Recipes
from ragkit.progress import Progress
from ragkit.readers import ReaderPool, ReadFailure, ReadLimits, ReadResult
from ragkit.reports import FailedSource, IngestReport
from ragkit.retrieval.base import ChunkEmbedder, FloatMatrix
from ragkit.store.base import (
    DocumentSpans,
    IndexedDocument,
    KnownDocument,
    SourceFailure,
    SourceUpdate,
    StoreReader,
    StoreWriter,
)
from ragkit.types import Chunk, Document

logger = logging.getLogger(__name__)

# A group is committed at the latest after this many chunks, so that a kill costs half a minute of embedding.
COMMIT_CHUNKS = 512


@dataclass(frozen=True, slots=True)
class IngestTools:
    """What an ingest works with."""

    chunker: Chunker
    embedder: ChunkEmbedder
    max_tokens: int
    recipes: Recipes
    limits: ReadLimits
    commit_bytes: int


@dataclass(slots=True)
class _Pending:
    """A source that was read and chunked and waits for its vectors; `chunks` is None for a document known already."""

    item: PlannedSource
    result: ReadResult
    documents: list[tuple[Document, list[Chunk] | None]]


@dataclass(slots=True)
class _Tally:
    """What has been committed so far."""

    added: int = 0
    updated: int = 0
    skipped: int = 0
    chunks: int = 0
    tokens: int = 0
    failed: list[FailedSource] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    heirs: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"chunk": 0.0, "embed": 0.0, "embed_cpu": 0.0, "commit": 0.0}
    )


class _StopRequested(Exception):
    """Leaves the embedding of a group that is not committed yet; the next run does it again."""


class Ingest:
    """One run over a plan. Not reusable."""

    def __init__(
        self, store: StoreReader, writer: StoreWriter, tools: IngestTools, progress: Progress, stop: Event | None = None
    ) -> None:
        self._store = store
        self._writer = writer
        self._tools = tools
        self._progress = progress
        self._stop = stop or Event()
        self._tally = _Tally()
        self._pending: list[_Pending] = []
        self._pending_documents: dict[str, list[Chunk]] = {}
        self._pending_chunks = 0
        self._pending_bytes = 0

    def run(self, plan: IngestPlan) -> IngestReport:
        """Carry the plan out and return what was committed.

        Raises:
            StoreError: the store cannot be written (full disk, damage); everything committed before stays.
        """
        started = time.perf_counter()
        work = plan.of(Action.ADD, Action.UPDATE)
        self._progress.start(len(work), sum(item.source.size for item in work))
        self._relink(plan)
        for item in plan.of(Action.KNOWN_FAILURE):
            self._report_known_failure(item)
        removed = self._writer.remove(plan.removed) if plan.removed else ()
        try:
            for item, outcome in self._read(work):
                self._check_stop()
                if isinstance(outcome, ReadFailure) and _is_skipped(outcome):
                    self._tally.skipped += 1
                    self._progress.advance(documents=1, bytes=item.source.size)
                elif isinstance(outcome, ReadFailure):
                    self._commit_failure(item, outcome.error)
                else:
                    self._add(item, outcome)
            self._flush()
        except _StopRequested:
            logger.info("stopped; what was read and not committed yet is left to the next run")
        tally = self._tally
        return IngestReport(
            added=tally.added,
            updated=tally.updated,
            unchanged=len(plan.of(Action.UNCHANGED)),
            relinked=len(plan.of(Action.RELINK)),
            removed=len(removed),
            skipped=tally.skipped,
            failed=tuple(tally.failed),
            chunks=tally.chunks,
            tokens=tally.tokens,
            seconds=time.perf_counter() - started,
            interrupted=self._stop.is_set(),
            warnings=tuple(tally.warnings),
            timings_s=dict(tally.seconds),
        )

    @property
    def heirs(self) -> dict[str, str]:
        """Chunks that have the text of replaced ones now, by the id of the replaced one."""
        return self._tally.heirs

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _StopRequested

    def _relink(self, plan: IngestPlan) -> None:
        for item in plan.of(Action.RELINK):
            assert item.record is not None
            source = item.source
            self._writer.relink(item.record.uri, source.uri, size=source.size, mtime_ns=source.mtime_ns)
        for item in plan.of(Action.UNCHANGED):
            assert item.record is not None
            if (item.record.size, item.record.mtime_ns) != (item.source.size, item.source.mtime_ns):
                self._writer.touch(item.source.uri, size=item.source.size, mtime_ns=item.source.mtime_ns)

    def _report_known_failure(self, item: PlannedSource) -> None:
        failure = item.record.failure if item.record else None
        if failure is not None:
            message = f"{failure.message} (known; --retry-failed reads it again)"
            self._tally.failed.append(FailedSource(item.source.uri, failure.stage, failure.code, message))

    def _read(self, work: list[PlannedSource]) -> Iterator[tuple[PlannedSource, ReadResult | ReadFailure]]:
        with ReaderPool(limits=self._tools.limits) as pool:
            yield from zip(work, pool.map(item.source for item in work), strict=True)

    def _add(self, item: PlannedSource, result: ReadResult) -> None:
        """Chunk what was read and queue it; commit when the group is full."""
        started = time.perf_counter()
        self._tally.warnings.extend(f"{item.source.uri}: {warning}" for warning in result.warnings)
        self._report_failed_rows(item, result)
        pending = _Pending(item, result, [])
        try:
            for document in result.documents:
                pending.documents.append((document, self._chunks_of(document)))
        except ChunkingError as error:
            self._commit_failure(item, ReadError(str(error), code=error.code, stage="chunk"))
            return
        finally:
            self._tally.seconds["chunk"] += time.perf_counter() - started
        self._pending.append(pending)
        if self._pending_chunks >= COMMIT_CHUNKS or self._pending_bytes >= self._tools.commit_bytes:
            self._flush()

    def _report_failed_rows(self, item: PlannedSource, result: ReadResult) -> None:
        uri = item.source.uri
        rows = result.failed_rows
        self._tally.failed.extend(FailedSource(f"{uri}#row={row.row}", "parse", row.code, row.message) for row in rows)
        if result.failed_row_count > len(rows):
            self._tally.warnings.append(f"{uri}: {result.failed_row_count - len(rows)} more rows failed")

    def _chunks_of(self, document: Document) -> list[Chunk] | None:
        """Return the chunks, cut once for equal documents of a group; None for a document that is stored already."""
        if self._tools.recipes.same_chunks(self._store.document_recipe(document.doc_id)):
            return None
        chunks = self._pending_documents.get(document.doc_id)
        if chunks is None:
            chunks = with_metadata(document, self._tools.chunker.chunk(document))
            check_chunks(document, chunks, self._tools.max_tokens)
            self._pending_documents[document.doc_id] = chunks
            self._pending_chunks += len(chunks)
            self._pending_bytes += len(document.text)
        return chunks

    def _flush(self) -> None:
        """Embed and commit what is pending, all of it in one transaction."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        self._pending_documents = {}
        self._pending_chunks = self._pending_bytes = 0
        try:
            updates = self._embed(pending)
        except RetrievalError as error:
            if len(pending) == 1:
                self._commit_failure(pending[0].item, ReadError(str(error), code=error.code, stage="embed"))
                return
            for one in pending:  # one bad source must not take its neighbours along
                self._pending = [one]
                self._flush()
            return
        started = time.perf_counter()
        report = self._writer.commit(updates)
        self._tally.seconds["commit"] += time.perf_counter() - started
        self._tally.added += len(report.added)
        self._tally.updated += len(report.updated)
        self._tally.chunks += report.rows
        self._tally.heirs.update(report.heirs)
        self._progress.advance(documents=len(pending), bytes=sum(one.item.source.size for one in pending))

    def _embed(self, pending: list[_Pending]) -> list[SourceUpdate]:
        vectors = self._vectors_of({d.doc_id: (d, chunks) for one in pending for d, chunks in one.documents if chunks})
        none = np.empty((0, self._tools.embedder.dim), np.float32)
        updates = []
        for one in pending:
            documents: list[IndexedDocument | KnownDocument] = []
            for document, chunks in one.documents:
                if chunks is None:
                    documents.append(KnownDocument(document.doc_id, document.uri, document.metadata))
                else:
                    documents.append(IndexedDocument(document, chunks, vectors.get(document.doc_id, none)))
            updates.append(replace(self._update_of(one.item, one.result), documents=tuple(documents)))
        return updates

    def _vectors_of(self, documents: dict[str, tuple[Document, list[Chunk]]]) -> dict[str, FloatMatrix]:
        """Return the vectors (chunks, dim) of each document, all embedded in one call: long batches pad less."""
        if not documents:
            return {}
        started, started_cpu = time.perf_counter(), time.process_time()

        def on_tokens(tokens: int) -> None:
            self._progress.advance(tokens=tokens)
            self._check_stop()

        whole = [
            DocumentSpans(document.text, [(chunk.char_start, chunk.char_stop) for chunk in chunks])
            for document, chunks in documents.values()
        ]
        vectors = self._tools.embedder.encode_chunks(whole, on_tokens=on_tokens)
        self._tally.seconds["embed"] += time.perf_counter() - started
        self._tally.seconds["embed_cpu"] += time.process_time() - started_cpu
        self._tally.tokens += sum(chunk.token_count for _, chunks in documents.values() for chunk in chunks)
        stops = np.cumsum([len(chunks) for _, chunks in documents.values()])
        return dict(zip(documents, np.split(vectors, stops[:-1]), strict=True))

    def _update_of(self, item: PlannedSource, result: ReadResult) -> SourceUpdate:
        source = result.source  # as it was when it was read, which may be later than when it was found
        return SourceUpdate(
            uri=item.source.uri,
            content_sha256=result.content_sha256,
            size=source.size,
            mtime_ns=source.mtime_ns,
            media_type=str(result.media_type),
            reader=result.reader,
            recipe=self._tools.recipes.of(str(result.media_type)),
        )

    def _commit_failure(self, item: PlannedSource, error: ReadError) -> None:
        """Record why a source has no documents. What it had before stays visible."""
        source = item.source
        self._tally.failed.append(FailedSource(source.uri, error.stage, error.code, str(error)))
        self._progress.message(str(error) if source.uri in str(error) else f"{source.uri}: {error}")
        failure = SourceFailure(error.code, error.stage, str(error))
        self._writer.commit(
            [
                SourceUpdate(
                    uri=source.uri,
                    content_sha256=item.content_sha256,
                    size=source.size,
                    mtime_ns=source.mtime_ns,
                    recipe=self._tools.recipes.of(""),
                    failure=failure,
                )
            ]
        )
        self._progress.advance(documents=1, bytes=source.size)


def _is_skipped(failure: ReadFailure) -> bool:
    """Return whether the file only happens to lie in a folder, and is nothing that anyone reads."""
    return failure.error.code == "unsupported" and not failure.source.named
