"""The contracts of reading and writing a store, and the records that they exchange.

`Store` (ragkit.store.store) implements `StoreReader`, `Writer` (ragkit.store.writer) implements `StoreWriter`.
Nothing here imports numpy or pyarrow at run time, so a status query starts in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ragkit.store.records import (
    CommitReport,
    DocumentLink,
    DocumentSpans,
    GcReport,
    IndexedDocument,
    IndexRecord,
    KnownDocument,
    KVEntry,
    KVTotals,
    Problem,
    SourceFailure,
    SourceRecord,
    SourceStatus,
    SourceUpdate,
    StoreCounts,
    StoredChunk,
    StoreMeta,
    VectorPart,
    VectorTable,
    VerifyReport,
)
from ragkit.types import Document, MetadataValue, PageSpan

if TYPE_CHECKING:
    from ragkit.store.records import RowIds, Vectors

__all__ = [
    "CommitReport",
    "DocumentLink",
    "DocumentSpans",
    "GcReport",
    "IndexRecord",
    "IndexedDocument",
    "KVEntry",
    "KVTotals",
    "KnownDocument",
    "Problem",
    "SourceFailure",
    "SourceRecord",
    "SourceStatus",
    "SourceUpdate",
    "StoreCounts",
    "StoreMeta",
    "StoreReader",
    "StoreWriter",
    "StoredChunk",
    "VectorPart",
    "VectorTable",
    "VerifyReport",
]


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
        """Return the sources whose visible documents come from this content: how a rename is recognised.

        Damaged ones are left out.
        """
        ...

    def document(self, doc_id: str) -> Document:
        """Return a document, joined from its chunks and checked against its id.

        `uri` and `metadata` are those of its first link.

        Raises:
            StoreError: there is no such document.
            StoreCorruptError: its stored bytes rotted.
        """
        ...

    def pages(self, doc_id: str) -> tuple[PageSpan, ...]:
        """Return the page spans of a document, empty for one without pages; its text is not read.

        Raises:
            StoreError: there is no such document.
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

    def known_chunks(self, chunk_ids: Sequence[str]) -> set[str]:
        """Return which of these chunks are there; nothing of them is read."""
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

    def fts_tokens(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the full-text index's own terms of each text, in order."""
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

    def kv_listing(self) -> list[tuple[Path, KVEntry]]:
        """Return where every stored KV lies, oldest first."""
        ...

    def kv_totals(self) -> KVTotals:
        """Return how much chunk KV is stored."""
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

    def staged_recipe(self, doc_id: str) -> str | None:
        """Return the recipe of a document that came with a part of a source and is not visible yet, or None.

        It may be committed as a `KnownDocument`, like one that is stored.
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
        self, *, embedder_id: str, dim: int, embed: Callable[[Sequence[DocumentSpans]], Vectors], batch_rows: int = 4096
    ) -> int:
        """Replace every vector and the embedder's identity in one transaction; return the rows.

        `embed` gets whole documents and returns the vectors of all their chunks in order.
        """
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

    def add_kv(self, parts: Iterable[bytes | memoryview], entries: Sequence[KVEntry]) -> str:
        """Store one KV segment and where its chunks lie in it; return its sha256."""
        ...

    def remove_kv(self, keys: Sequence[str]) -> None:
        """Forget KV entries (unknown keys are ignored); a segment's file goes with its last entry."""
        ...
