"""What the store exchanges with the rest of ragkit: records, and the contracts of reading and writing.

`Store` (ragkit.store.store) implements `StoreReader`, `Writer` (ragkit.store.writer) implements `StoreWriter`.
Nothing here imports numpy or pyarrow at run time, so a status query starts in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What one commit did; URIs in the order of the group, `rows` is the number of chunks that were added."""

    generation: int
    added: tuple[str, ...]
    updated: tuple[str, ...]
    failed: tuple[str, ...]
    rows: int


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
    """Where the KV of one chunk lies within a KV segment: `key` is its identity, `crc32` that of its bytes."""

    key: str
    chunk_id: str
    offset: int
    bytes: int
    crc32: int


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
    """Something `verify` found: where (`part`, `name`), what is wrong, what to do, and whose sources it touches."""

    part: str
    name: str
    message: str
    remedy: str
    uris: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` looked at and found; `problems` is empty for an undamaged store."""

    generation: int
    documents: int
    chunks: int
    bytes_read: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `gc` did. `pending_files` could not be removed yet, because a reader still pins an older generation."""

    bytes_freed: int
    removed_files: int
    rewritten_segments: int
    pending_files: int


class StoreReader(Protocol):
    """Reads of a store. Safe from any thread and after a fork; damaged rows raise `StoreCorruptError`."""

    @property
    def folder(self) -> Path:
        """The store folder."""
        ...

    @property
    def generation(self) -> int:
        """Number of the last commit (within a snapshot: of the pinned one); 0 for a new store."""
        ...

    @property
    def meta(self) -> StoreMeta:
        """What the store was built with."""
        ...

    def snapshot(self) -> AbstractContextManager[int]:
        """Pin one generation for all reads of this thread within the block, and return its number."""
        ...

    def counts(self) -> StoreCounts:
        """Return how much the store holds."""
        ...

    def sources(self, status: SourceStatus | None = None) -> list[SourceRecord]:
        """Return the known sources in order of URI, all or those with one status."""
        ...

    def source(self, uri: str) -> SourceRecord | None:
        """Return one source, or None where it is unknown."""
        ...

    def sources_with_content(self, content_sha256: str) -> list[SourceRecord]:
        """Return the sources whose visible documents come from this content: how a rename is recognised."""
        ...

    def document(self, doc_id: str) -> Document:
        """Return a document, joined from its chunks and checked against its id.

        `uri` and `metadata` are those of its first link.

        Raises:
            StoreError: there is no such document.
            StoreCorruptError: its stored bytes rotted.
        """
        ...

    def document_recipe(self, doc_id: str) -> str | None:
        """Return the recipe a stored document was chunked with; None where it is absent or damaged."""
        ...

    def links(self, doc_id: str) -> list[DocumentLink]:
        """Return every place where a document stands, first one first; empty where it is unknown."""
        ...

    def source_documents(self, uri: str) -> list[DocumentLink]:
        """Return the documents of one source in their order; empty where it is unknown."""
        ...

    def chunks(self, row_ids: Sequence[int] | RowIds) -> list[StoredChunk]:
        """Return the chunks of these rows in the given order.

        Raises:
            StoreError: a row is not in this generation (read the index and the rows within one `snapshot`).
            StoreCorruptError: a row's bytes rotted.
        """
        ...

    def chunks_by_id(self, chunk_ids: Sequence[str]) -> list[StoredChunk]:
        """Return the chunks with these ids in the given order; errors as for `chunks`."""
        ...

    def chunk_at(self, doc_id: str, index: int) -> StoredChunk | None:
        """Return chunk `index` of a document (a neighbour, say), or None beyond its ends."""
        ...

    def row_ids(self) -> RowIds:
        """Return the row ids of all chunks, ascending."""
        ...

    def match(self, fts_query: str, limit: int, allowed: RowIds | None = None) -> tuple[RowIds, Vectors]:
        """Return row ids and BM25 scores (float32, higher is better) of the best `limit` chunks, best first.

        `fts_query` is FTS5 MATCH syntax made of quoted phrases (`fts_phrase`); `allowed` restricts the rows.

        Raises:
            UsageError: the query is not valid FTS5 syntax.
        """
        ...

    def document_frequency(self, terms: Sequence[str]) -> dict[str, int]:
        """Return for each term the number of chunks that hold it, after the index's own tokenising and stemming.

        A term that the tokenizer cuts into several tokens counts as its rarest one; one of no tokens counts 0.
        """
        ...

    def rows_where(self, filters: Mapping[str, MetadataValue]) -> RowIds:
        """Return the sorted row ids of chunks of documents that fulfil every filter.

        `uri` takes a source's or document's URI or a glob, `doc_id` a document id; any other key is compared with the
        metadata of the document's links as text (`year=2020` finds 2020 and "2020").
        """
        ...

    def vectors(self) -> VectorTable:
        """Return every live vector, memory-mapped. Checksums are verified once per process and file.

        Raises:
            StoreCorruptError: a segment is missing or its bytes rotted.
        """
        ...

    def index_record(self) -> IndexRecord | None:
        """Return the recorded derived index, or None. Its file is not checked: `checked_index` does that."""
        ...

    def checked_index(self) -> IndexRecord | None:
        """Return the recorded index if its file is there and its sha256 is right; else None, with a logged warning."""
        ...

    def kv_entries(self, keys: Sequence[str]) -> dict[str, tuple[Path, KVEntry]]:
        """Return where the known ones of these KV keys lie."""
        ...


class StoreWriter(Protocol):
    """The one writer of a store, while it holds the lock. Every method is one transaction, visible as a whole."""

    def configure(
        self, *, embedder_id: str, dim: int, chunker: str, chunker_fingerprint: str, tokenizer_id: str
    ) -> None:
        """Record what the following commits are made with.

        Raises:
            EmbedderMismatchError: the store holds vectors of another embedder or dimension.
        """
        ...

    def commit(self, group: Sequence[SourceUpdate]) -> CommitReport:
        """Store one commit group (one large source or many small ones) and return what it did.

        Raises:
            UsageError: the group contradicts itself (a URI twice, chunks that do not tile the text, wrong shapes).
            StoreSpaceError: the disk is full; nothing of the group is visible.
        """
        ...

    def relink(self, old_uri: str, new_uri: str, *, size: int, mtime_ns: int) -> None:
        """Rename a source (and the URIs of its documents) without touching its chunks and vectors."""
        ...

    def touch(self, uri: str, *, size: int, mtime_ns: int) -> None:
        """Record a new size and time of a source whose content is unchanged."""
        ...

    def remove(self, uris: Sequence[str], *, erase: bool = False) -> tuple[str, ...]:
        """Forget sources, and documents that no other source links to; return the URIs.

        `erase` also overwrites: text, full-text terms, vectors and KV are gone from every file when this returns.

        Raises:
            UsageError: a URI is unknown; nothing was removed.
            StoreLockedError: `erase` waited in vain for a reader; the next `gc` or write finishes the job.
        """
        ...

    def reset_embeddings(
        self, *, embedder_id: str, dim: int, embed: Callable[[Sequence[str]], Vectors], batch_rows: int = 4096
    ) -> int:
        """Replace every vector by `embed(texts)` and the embedder's identity in one transaction; return the rows."""
        ...

    def set_index(
        self,
        *,
        generation: int,
        row_ids: RowIds,
        kind: str,
        params: Mapping[str, MetadataValue],
        write: Callable[[Path], None],
    ) -> IndexRecord:
        """Store a derived index of `row_ids` at `generation`: `write` fills a temporary file, the rest is durable."""
        ...

    def add_kv(self, parts: Iterable[bytes], entries: Sequence[KVEntry]) -> str:
        """Store one KV segment and where its chunks lie in it; return its sha256."""
        ...
