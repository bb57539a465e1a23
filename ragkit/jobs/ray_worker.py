"""What runs in a worker of a Ray cluster: the steps of jobs, with models that it loads by their names.

A worker never opens the store for writing. What it makes goes back to the driver, which commits it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.config import PipelineConfig
from ragkit.errors import ReadError
from ragkit.jobs.local_executor import PART_DOCUMENTS, part_stops, read_limits
from ragkit.jobs.steps import ChunkedSource, FailedPreparation, Outcome, chunk_source, embed_sources
from ragkit.parts import Parts
from ragkit.readers import ReadFailure, ReadResult
from ragkit.settings import forbid_network

if TYPE_CHECKING:
    from ragkit.chunking.base import Chunker
    from ragkit.readers.origin import Source
    from ragkit.types import Chunk


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """What a worker works with, empty where it does not: the driver compares it with its own."""

    node: str
    chunker: str = ""
    embedder_id: str = ""
    generator: str = ""
    generation: int = -1


@dataclass(frozen=True, slots=True)
class LargeTable:
    """A source of many documents, read by a worker and kept on its disk: what it is, and where its parts end."""

    source: Source
    content_sha256: str
    stops: tuple[int, ...]


class RayWorker:
    """Does steps of an ingest, one call at a time.

    Args:
        config: which models, and how.
        folder: the store's.
        threads: how many a model may use.
        reads, embeds: which steps it will be asked for, so that it loads what they need when it starts.
        part_documents: a source of more documents is handed over in parts of so many.
    """

    def __init__(
        self,
        config: PipelineConfig,
        folder: str,
        threads: int,
        reads: bool,
        embeds: bool,
        part_documents: int = PART_DOCUMENTS,
    ) -> None:
        if config.offline:
            forbid_network(os.environ)
        self._config = config
        self._parts = Parts(Path(folder), config)
        self._threads = threads
        self._reads = reads
        self._embeds = embeds
        self._part_documents = part_documents
        self._table: ReadResult | None = None  # the large one that was read last
        self._chunker: Chunker | None = None

    def start(self) -> WorkerIdentity:
        """Load the models and return who this is."""
        limit_threads(self._threads)
        chunker = self._loaded_chunker().fingerprint if self._reads else ""
        embedder_id = self._parts.chunk_embedder.embedder_id if self._embeds else ""
        return WorkerIdentity(os.uname().nodename, chunker, embedder_id)

    def read(self, sources: Sequence[Source]) -> tuple[list[list[str] | LargeTable], list[ReadResult | ReadFailure]]:
        """Return the ids of the documents of each source, and what was read.

        In the place of a table of many documents stands where its parts end: `read_part` hands them over.
        """
        ids: list[list[str] | LargeTable] = []
        results: list[ReadResult | ReadFailure] = []
        for source in sources:
            result = self._read(source)
            if isinstance(result, ReadFailure):
                ids.append([])
            elif len(result.documents) > self._part_documents:
                self._table = result
                most = self._config.ingest.commit_mb << 20
                stops = tuple(part_stops(result.documents, most, self._part_documents))
                ids.append(LargeTable(result.source, result.content_sha256, stops))
                result = replace(result, documents=())
            else:  # documents that lie in a file of this machine are brought into memory: they go elsewhere
                result = replace(result, documents=list(result.documents))
                ids.append([document.doc_id for document in result.documents])
            results.append(result)
        return ids, results

    def read_part(
        self, table: LargeTable, start: int, stop: int
    ) -> tuple[list[list[str]], list[ReadResult | ReadFailure]]:
        """Return the ids of some documents of a table, and the table with these alone.

        A worker that has not read it does so now, and keeps it for the other parts.
        """
        known = self._table
        if known is None or (known.source.uri, known.content_sha256) != (table.source.uri, table.content_sha256):
            result = self._read(table.source)
            if isinstance(result, ReadFailure):
                return [[]], [result]
            if result.content_sha256 != table.content_sha256:
                error = ReadError(f"{table.source.uri}: was changed while it was read", code="changed", stage="read")
                return [[]], [ReadFailure(table.source, error)]
            self._table = known = result
        documents = list(known.documents[start:stop])
        return [[document.doc_id for document in documents]], [replace(known, documents=documents)]

    def _read(self, source: Source) -> ReadResult | ReadFailure:
        from ragkit.readers.reading import read_source

        try:
            return read_source(source, read_limits(self._config.ingest))
        except ReadError as error:
            return ReadFailure(source, error)

    def chunk(
        self, results: Sequence[ReadResult | ReadFailure], known: Set[str]
    ) -> tuple[float, list[ChunkedSource | FailedPreparation]]:
        """Return the seconds it took, and the sources with their chunks but for those of `known` documents."""
        started = time.perf_counter()
        chunker = self._loaded_chunker()
        seen: dict[str, Sequence[Chunk]] = {}
        max_tokens = self._config.chunking.max_tokens
        chunked = [chunk_source(result, chunker, max_tokens, known.__contains__, seen) for result in results]
        return time.perf_counter() - started, chunked

    def embed(self, chunked: Sequence[ChunkedSource | FailedPreparation]) -> tuple[list[Outcome], dict[str, float]]:
        """Return the sources with the vectors of their chunks, and what it took."""
        started, started_cpu = time.perf_counter(), time.process_time()
        waiting = [source for source in chunked if isinstance(source, ChunkedSource)]
        embedded = iter(embed_sources(waiting, self._parts.chunk_embedder) if waiting else ())
        outcomes = [next(embedded) if isinstance(source, ChunkedSource) else source for source in chunked]
        seconds = {"embed": time.perf_counter() - started, "embed_cpu": time.process_time() - started_cpu}
        return outcomes, seconds

    def _loaded_chunker(self) -> Chunker:
        if self._chunker is None:
            from ragkit.chunking.registry import create_chunker

            self._chunker = create_chunker(self._config.chunking, self._parts.tokenizer, self._parts)
        return self._chunker


def limit_threads(threads: int) -> None:
    """Let models use as many threads as the worker has cores: Ray runs a worker beside others."""
    import torch

    torch.set_num_threads(threads)
