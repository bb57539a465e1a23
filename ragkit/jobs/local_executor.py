"""The steps of an ingest in this process; only parsers run in child processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ragkit.chunking.base import Chunker
from ragkit.config import IngestConfig, PipelineConfig
from ragkit.jobs.executor import PreparedGroup, Watch
from ragkit.jobs.plan import PlannedSource
from ragkit.jobs.steps import ChunkedSource, FailedPreparation, Known, chunk_source, embed_sources
from ragkit.readers import ReaderPool, ReadLimits, ReadResult
from ragkit.retrieval.base import ChunkEmbedder
from ragkit.types import Chunk, Document

# A group is committed at the latest after this many chunks, so that a kill costs half a minute of embedding.
COMMIT_CHUNKS = 512
# A table of more rows is committed in parts of so many.
PART_DOCUMENTS = 2048

_MEGABYTE = 1 << 20


@dataclass(slots=True)
class _Group:
    """Sources that were chunked and wait for their vectors; `chunks` by document, cut once for equal ones."""

    sources: list[tuple[PlannedSource, ChunkedSource]] = field(default_factory=list)
    chunks: dict[str, Sequence[Chunk]] = field(default_factory=dict)
    chunk_count: int = 0
    text_bytes: int = 0
    chunk_seconds: float = 0.0

    def add(self, item: PlannedSource, source: ChunkedSource, known_before: int) -> None:
        """Take a source; `known_before` documents of the group had chunks before it."""
        self.sources.append((item, source))
        fresh = list(self.chunks)[known_before:]
        self.chunk_count += sum(len(self.chunks[doc_id]) for doc_id in fresh)
        self.text_bytes += sum(chunks[-1].char_stop for doc_id in fresh if (chunks := self.chunks[doc_id]))


class LocalExecutor:
    """Reads in child processes, chunks and embeds here.

    Args:
        config: limits of reading, the cap of chunks, and how much one group may hold.
        chunker: cuts documents.
        embedder: embeds their chunks.
    """

    def __init__(self, config: PipelineConfig, chunker: Chunker, embedder: ChunkEmbedder) -> None:
        self._chunker = chunker
        self._embedder = embedder
        self._max_tokens = config.chunking.max_tokens
        self._limits = read_limits(config.ingest)
        self._commit_bytes = config.ingest.commit_mb * _MEGABYTE

    def prepare(self, work: Sequence[PlannedSource], known: Known, watch: Watch) -> Iterator[PreparedGroup]:
        """Yield groups of one large source or many small ones; a source that failed is a group by itself."""
        group = _Group()
        with ReaderPool(limits=self._limits) as pool:
            for item, result in zip(work, pool.map(item.source for item in work), strict=True):
                watch.check()
                if isinstance(result, ReadResult) and len(result.documents) > PART_DOCUMENTS:
                    if group.sources:
                        yield self._embedded(group, watch)
                        group = _Group()
                    yield from self._in_parts(item, result, known, watch)
                    continue
                started, before = time.perf_counter(), len(group.chunks)
                outcome = chunk_source(result, self._chunker, self._max_tokens, known, group.chunks)
                group.chunk_seconds += time.perf_counter() - started
                del result
                if isinstance(outcome, FailedPreparation):
                    yield PreparedGroup([(item, outcome)])
                    continue
                group.add(item, outcome, before)
                if group.chunk_count >= COMMIT_CHUNKS or group.text_bytes >= self._commit_bytes:
                    yield self._embedded(group, watch)
                    group = _Group()
        if group.sources:
            yield self._embedded(group, watch)

    def _in_parts(self, item: PlannedSource, result: ReadResult, known: Known, watch: Watch) -> Iterator[PreparedGroup]:
        """Yield a source of many documents part by part, so that never all of them are in memory."""
        stops = list(part_stops(result.documents, self._commit_bytes))
        start = 0
        for stop in stops:
            group = _Group()
            started = time.perf_counter()
            part = replace(result, documents=result.documents[start:stop])
            outcome = chunk_source(part, self._chunker, self._max_tokens, known, group.chunks)
            group.chunk_seconds = time.perf_counter() - started
            if isinstance(outcome, FailedPreparation):
                yield PreparedGroup([(item, outcome)])
                return
            group.add(item, outcome, 0)
            prepared = self._embedded(group, watch)
            ((_, done),) = prepared.outcomes
            if isinstance(done, FailedPreparation):
                yield prepared
                return
            yield PreparedGroup([(item, replace(done, more=stop < stops[-1]))], prepared.seconds)
            start = stop

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end: the parser processes end with `prepare`."""

    def _embedded(self, group: _Group, watch: Watch) -> PreparedGroup:
        def on_tokens(tokens: int) -> None:
            watch.progress.advance(tokens=tokens)
            watch.check()

        started, started_cpu = time.perf_counter(), time.process_time()
        outcomes = embed_sources([source for _, source in group.sources], self._embedder, on_tokens)
        seconds = {
            "chunk": group.chunk_seconds,
            "embed": time.perf_counter() - started,
            "embed_cpu": time.process_time() - started_cpu,
        }
        items = [item for item, _ in group.sources]
        return PreparedGroup(list(zip(items, outcomes, strict=True)), seconds)


def part_stops(documents: Sequence[Document], most_characters: int, most_documents: int | None = None) -> Iterator[int]:
    """Yield where the parts of a source's documents end: at so many documents, or at so much text."""
    most_documents = PART_DOCUMENTS if most_documents is None else most_documents
    start = characters = 0
    for index, document in enumerate(documents):
        characters += len(document.text)
        if index + 1 - start >= most_documents or characters >= most_characters:
            yield index + 1
            start, characters = index + 1, 0
    if start < len(documents):
        yield len(documents)


def read_limits(config: IngestConfig) -> ReadLimits:
    """Return what reading one source may cost."""
    return ReadLimits(timeout_s=config.parse_timeout_s, memory_mb=config.parse_memory_mb)
