"""The records that the store exchanges with the rest of ragkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ragkit.types import Chunk, Document, Metadata, MetadataValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    RowIds = NDArray[np.int64]
    Vectors = NDArray[np.float32]


class SourceStatus(StrEnum):
    """How the last look at a source ended.

    `failed` covers everything that gave no documents (the failure's code says which: empty, needs_ocr, timeout, ...).
    `damaged` sources have to be read again, because stored bytes of theirs rotted.
    """

    OK = "ok"
    FAILED = "failed"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class StoreMeta:
    """What the whole store was built with; embedder, chunker and tokenizer are empty until `StoreWriter.configure`."""

    format_version: int
    store_id: str
    fts_tokenizer: str
    embedder_id: str = ""
    dim: int = 0
    chunker: str = ""
    chunker_fingerprint: str = ""
    tokenizer_id: str = ""


@dataclass(frozen=True, slots=True)
class SourceFailure:
    """Why a source gave no documents: stable `code`, `stage` (read, parse, chunk, embed, commit), one-line message."""

    code: str
    stage: str
    message: str


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One known source.

    Attributes:
        content_sha256, size, mtime_ns: the content that was last looked at, whether that went well or not.
        recipe: digest of everything that turned the content into chunks (reader, chunker), chosen by the caller.
        indexed_sha256: the content whose documents are visible now; differs from `content_sha256` after a failed
            change, and is empty where nothing is visible.
        attempts: failed looks in a row at this content.
        generation: the commit that last changed this record.
        documents, chunks: how many the source links to.
    """

    uri: str
    content_sha256: str
    size: int
    mtime_ns: int
    media_type: str
    reader: str
    recipe: str
    status: SourceStatus
    failure: SourceFailure | None
    attempts: int
    indexed_sha256: str
    generation: int
    documents: int
    chunks: int


class DocumentSpans(NamedTuple):
    """A document's text and the half-open spans of its chunks, in order: what chunks are embedded from."""

    text: str
    spans: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class IndexedDocument:
    """A document ready to be stored: its chunks tile its text; `vectors` is (chunks, dim) float32, one row a chunk."""

    document: Document
    chunks: Sequence[Chunk]
    vectors: Vectors


@dataclass(frozen=True, slots=True)
class KnownDocument:
    """A document that is stored already (`StoreReader.document_recipe`) and is only linked, without being embedded."""

    doc_id: str
    uri: str
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceUpdate:
    """The new state of one source: its documents, or why there are none.

    With `failure` the documents that the source had before stay visible, and the failure is recorded beside them.

    With `more` these are not all documents of a large source: others follow, in later commits of the same writer, each
    alone in its group, and the last of them is without it. That one makes all of them visible at once; until then the
    source is what it was. A job that is cut off has what came kept for the next one (`StoreWriter.staged_recipe`).
    """

    uri: str
    content_sha256: str
    size: int
    mtime_ns: int
    media_type: str = ""
    reader: str = ""
    recipe: str = ""
    documents: tuple[IndexedDocument | KnownDocument, ...] = ()
    failure: SourceFailure | None = None
    more: bool = False


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What one commit did; URIs in the order of the group, `rows` is the number of chunks that were added.

    A source that comes in parts is named, and its chunks are counted, by the commit of its last one.

    `heirs` names, by the id of a chunk that was replaced, the chunk that has its text now.
    """

    generation: int
    added: tuple[str, ...]
    updated: tuple[str, ...]
    failed: tuple[str, ...]
    rows: int
    heirs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DocumentLink:
    """One place where a document stands: `source_uri` is the file, `uri` the document in it (`...#row=N`)."""

    source_uri: str
    doc_id: str
    uri: str
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk with its permanent row id (the FAISS id) and the URI and metadata of the first place it stands in."""

    row_id: int
    chunk: Chunk
    uri: str
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class VectorPart:
    """Some vectors, usually memory-mapped: `vectors[i]` (rows, dim) belongs to `row_ids[i]`, which ascend."""

    row_ids: RowIds
    vectors: Vectors


@dataclass(frozen=True, slots=True)
class VectorTable:
    """Every live vector of one generation; parts stand in ascending order of row id, and so does `row_ids` (n,)."""

    generation: int
    dim: int
    row_ids: RowIds
    parts: tuple[VectorPart, ...]


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """A derived vector index on disk, made from the vectors of `generation`.

    `ids_sha256` is `ids_digest(row_ids)` of the rows it holds, so that an index is never used with other rows.
    """

    generation: int
    path: Path
    kind: str
    sha256: str
    ids_sha256: str
    rows: int
    params: Mapping[str, MetadataValue]


@dataclass(frozen=True, slots=True)
class KVEntry:
    """Where one KV lies within a KV segment: `key` is its identity, `crc32` that of its bytes.

    `chunk_id` is the chunk that it is of, or a `document_owner`.
    """

    key: str
    chunk_id: str
    offset: int
    bytes: int
    crc32: int


_OF_DOCUMENT = "+document"


def document_owner(chunk_id: str) -> str:
    """Return the owner of KV that holds more of a document than its chunk `chunk_id`.

    It goes when the chunk goes and never passes to another chunk of the same text, which says nothing of the rest.
    """
    return chunk_id + _OF_DOCUMENT


def is_document_owner(owner: str) -> bool:
    """Return whether KV of this owner holds more of a document than a chunk."""
    return owner.endswith(_OF_DOCUMENT)


def owning_chunk(owner: str) -> str:
    """Return the chunk with which KV of this owner goes: the owner itself unless it is a `document_owner`."""
    return owner.removesuffix(_OF_DOCUMENT)


@dataclass(frozen=True, slots=True)
class KVTotals:
    """How much chunk KV the store holds: entries (chunks of equal text share one), and bytes of the segment files."""

    entries: int
    bytes: int


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """How much a generation holds; `bytes_on_disk` counts every file of the store folder."""

    generation: int
    sources: int
    failed: int
    damaged: int
    documents: int
    chunks: int
    tokens: int
    segments: int
    bytes_on_disk: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something `verify` found: where (`part`, `name`), what is wrong, what to do, and whose sources it touches.

    `key` is the row's key in the catalogue, for repairs.
    """

    part: str
    name: str
    message: str
    remedy: str
    uris: tuple[str, ...] = ()
    key: int = 0


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` looked at and found; `problems` is empty for an undamaged store.

    `marked` names the sources that a repair marked `damaged`, so that the next ingest reads them again.
    """

    generation: int
    documents: int
    chunks: int
    bytes_read: int
    problems: tuple[Problem, ...]
    marked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `gc` did. `pending_files` could not be removed yet, because a reader still pins an older generation."""

    bytes_freed: int
    removed_files: int
    rewritten_segments: int
    pending_files: int
