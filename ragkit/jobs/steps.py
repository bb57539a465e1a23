"""The steps of an ingest, the same whatever runs them: read, chunk, embed. None of them touches the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ragkit.chunking.base import Chunker, check_chunks, chunk_documents
from ragkit.chunking.metadata import with_metadata
from ragkit.errors import ChunkingError, ReadError, RetrievalError
from ragkit.readers import ReadFailure, ReadResult
from ragkit.readers.base import FailedRow
from ragkit.readers.origin import Source
from ragkit.retrieval.base import ChunkEmbedder, FloatMatrix
from ragkit.store.base import DocumentSpans, IndexedDocument, KnownDocument
from ragkit.types import Chunk, Document

# Rows of a table that are cut together: they fill the passes of a chunker's model, and bound what waits for it.
_CUT_TOGETHER = 256

Known = Callable[[str], bool]  # whether the store has a document, by its id, in the chunks that it would get now


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What reading a source found beside its documents: `ReadResult` without them."""

    source: Source
    media_type: str
    reader: str
    content_sha256: str
    warnings: tuple[str, ...] = ()
    failed_rows: tuple[FailedRow, ...] = ()
    failed_row_count: int = 0


@dataclass(frozen=True, slots=True)
class ChunkedSource:
    """A source that waits for its vectors; a document's chunks are None where the store has them already."""

    facts: SourceFacts
    documents: Sequence[tuple[Document, Sequence[Chunk] | None]]


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """A source that is ready to be committed; with `more` a part of one, and the next groups hold the rest in order."""

    facts: SourceFacts
    documents: tuple[IndexedDocument | KnownDocument, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class FailedPreparation:
    """A source that gave no documents, and why; `facts` where it could be read."""

    source: Source
    error: ReadError
    facts: SourceFacts | None = None


Outcome = PreparedSource | FailedPreparation


def chunk_source(
    result: ReadResult | ReadFailure,
    chunker: Chunker,
    max_tokens: int,
    known: Known,
    seen: dict[str, Sequence[Chunk]] | None = None,
) -> ChunkedSource | FailedPreparation:
    """Return what was read with its chunks, each document cut once.

    Args:
        result: what was read.
        chunker: cuts it.
        max_tokens: the cap that every chunk is checked against.
        known: says which documents need no chunks.
        seen: chunks of documents that were cut already, by the document's id; gets those of this source.
    """
    if isinstance(result, ReadFailure):
        return FailedPreparation(result.source, result.error)
    facts = facts_of(result)
    seen = {} if seen is None else seen
    documents = list(result.documents)
    stored = {document.doc_id for document in documents if known(document.doc_id)}
    fresh = list({one.doc_id: one for one in documents if one.doc_id not in stored and one.doc_id not in seen}.values())
    try:
        for start in range(0, len(fresh), _CUT_TOGETHER):
            together = fresh[start : start + _CUT_TOGETHER]
            for document, cut in zip(together, chunk_documents(chunker, together), strict=True):
                chunks = with_metadata(document, cut)
                check_chunks(document, chunks, max_tokens)
                seen[document.doc_id] = chunks
    except ChunkingError as error:
        return FailedPreparation(result.source, ReadError(str(error), code=error.code, stage="chunk"), facts)
    return ChunkedSource(facts, [(one, None if one.doc_id in stored else seen[one.doc_id]) for one in documents])


def facts_of(result: ReadResult) -> SourceFacts:
    """Return what reading found, without the documents."""
    return SourceFacts(
        source=result.source,
        media_type=str(result.media_type),
        reader=result.reader,
        content_sha256=result.content_sha256,
        warnings=result.warnings,
        failed_rows=result.failed_rows,
        failed_row_count=result.failed_row_count,
    )


def embed_sources(
    sources: Sequence[ChunkedSource], embedder: ChunkEmbedder, on_tokens: Callable[[int], None] | None = None
) -> list[Outcome]:
    """Return the sources with the vectors of their chunks, all embedded in one call: long batches pad less.

    Where that fails, each source is embedded by itself, so that a bad one does not take its neighbours along.
    """
    try:
        return list(_embed(sources, embedder, on_tokens))
    except RetrievalError as error:
        if len(sources) == 1:
            facts = sources[0].facts
            return [FailedPreparation(facts.source, ReadError(str(error), code=error.code, stage="embed"), facts)]
        return [outcome for source in sources for outcome in embed_sources([source], embedder, on_tokens)]


def _embed(
    sources: Sequence[ChunkedSource], embedder: ChunkEmbedder, on_tokens: Callable[[int], None] | None
) -> list[Outcome]:
    chunked = {doc.doc_id: (doc, chunks) for source in sources for doc, chunks in source.documents if chunks}
    vectors: dict[str, FloatMatrix] = {}
    if chunked:
        whole = [
            DocumentSpans(document.text, [(chunk.char_start, chunk.char_stop) for chunk in chunks])
            for document, chunks in chunked.values()
        ]
        stops = np.cumsum([len(chunks) for _, chunks in chunked.values()])
        matrix = embedder.encode_chunks(whole, on_tokens=on_tokens)
        vectors = dict(zip(chunked, np.split(matrix, stops[:-1]), strict=True))
    none = np.empty((0, embedder.dim), np.float32)
    return [
        PreparedSource(
            source.facts,
            tuple(
                KnownDocument(document.doc_id, document.uri, document.metadata)
                if chunks is None
                else IndexedDocument(document, chunks, vectors.get(document.doc_id, none))
                for document, chunks in source.documents
            ),
        )
        for source in sources
    ]
