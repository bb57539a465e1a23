"""A store folder: the catalogue and its files. See `StoreReader` for what the reads promise."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ragkit.errors import StoreError, StoreFormatError, StoreMissingError
from ragkit.store import chunks, derived, fulltext, sources, upgrade, vectors
from ragkit.store.connections import DATABASE, connect, translated
from ragkit.store.files import folder_bytes
from ragkit.store.filesystem import refuse_network_folder
from ragkit.store.filters import filter_row_ids
from ragkit.store.locks import WriterLock
from ragkit.store.records import (
    DocumentLink,
    GcReport,
    IndexRecord,
    KVEntry,
    KVTotals,
    SourceRecord,
    SourceStatus,
    StoreCounts,
    StoredChunk,
    StoreMeta,
    VectorTable,
    VerifyReport,
)
from ragkit.store.schema import APPLICATION_ID, DEFAULT_FTS_TOKENIZER, PAGE_SIZE, create_tables
from ragkit.store.snapshots import WRITER_LOCK, Snapshots, missing_store, read_meta, require_store
from ragkit.types import Document, MetadataValue, PageSpan

if TYPE_CHECKING:
    from ragkit.store.records import RowIds, Vectors
    from ragkit.store.writer import Writer

LOCK_TIMEOUT_S = 10.0


class Store:
    """Reads one store folder, and hands out its writer. Use `create`, `open` or `open_or_create`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._snapshots = Snapshots(folder)
        self._tokenizer: fulltext.FtsTokenizer | None = None
        self._term_counts = fulltext.TermCounts()

    @classmethod
    def create(cls, folder: Path | str, *, fts_tokenizer: str = DEFAULT_FTS_TOKENIZER) -> Store:
        """Return a new, empty store.

        Raises:
            StoreError: there is a store in that folder already, or it lies on a network file system.
        """
        path = Path(folder)
        with translated(path):
            path.mkdir(parents=True, exist_ok=True)
            refuse_network_folder(path)
            lock = WriterLock(path / WRITER_LOCK, LOCK_TIMEOUT_S)
            try:
                _create(path, fts_tokenizer)
            finally:
                lock.release()
        return cls.open(path)

    @staticmethod
    def exists(folder: Path | str) -> bool:
        """Return whether `open` would find a store in `folder`."""
        return (Path(folder) / DATABASE).is_file()

    @classmethod
    def open(cls, folder: Path | str) -> Store:
        """Return the store in `folder`; one of an older format is upgraded first.

        Raises:
            StoreMissingError: there is none.
            StoreFormatError: a newer ragkit wrote it, or it is no store.
            StoreCorruptError: the catalogue cannot be read.
        """
        path = Path(folder)
        require_store(path)
        with translated(path):
            refuse_network_folder(path)
            connection = connect(path)
            try:
                outdated = _is_outdated(path, connection)
            finally:
                connection.close()
            if outdated:
                upgrade.upgrade(path)
        return cls(path)

    @classmethod
    def open_or_create(cls, folder: Path | str, *, fts_tokenizer: str = DEFAULT_FTS_TOKENIZER) -> Store:
        """Return the store in `folder`, made first where there is none."""
        try:
            return cls.open(folder)
        except StoreMissingError:
            try:
                return cls.create(folder, fts_tokenizer=fts_tokenizer)
            except StoreFormatError:
                raise
            except StoreError:
                return cls.open(folder)  # another process was faster

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections of all threads. Mapped vectors stay usable."""
        self._snapshots.close()

    @property
    def folder(self) -> Path:
        """The store folder."""
        return self._folder

    @property
    def generation(self) -> int:
        """Number of the last commit (within a snapshot: of the pinned one); 0 for a new store."""
        return self._snapshots.generation()

    @property
    def meta(self) -> StoreMeta:
        """What the store was built with."""
        with self._snapshots.reading() as connection:
            return StoreMeta(
                format_version=int(read_meta(connection, "format_version")),
                store_id=read_meta(connection, "store_id"),
                fts_tokenizer=read_meta(connection, "fts_tokenizer"),
                embedder_id=read_meta(connection, "embedder_id", ""),
                dim=int(read_meta(connection, "dim", "0")),
                chunker=read_meta(connection, "chunker", ""),
                chunker_fingerprint=read_meta(connection, "chunker_fingerprint", ""),
                tokenizer_id=read_meta(connection, "tokenizer_id", ""),
            )

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[int]:
        """Pin one generation for all reads of this thread within the block, and return its number."""
        with self._snapshots.reading():
            yield self._snapshots.generation()

    def counts(self) -> StoreCounts:
        """Return how much the store holds."""
        with self._snapshots.reading() as connection:
            status = dict(connection.execute("SELECT status, count(*) FROM sources GROUP BY status").fetchall())
            totals = "SELECT count(*), ifnull(sum(chunks), 0), ifnull(sum(tokens), 0) FROM documents"
            documents, chunk_count, tokens = connection.execute(totals).fetchone()
            (segments,) = connection.execute("SELECT count(*) FROM segments").fetchone()
            return StoreCounts(
                generation=self.generation,
                sources=sum(status.values()),
                failed=status.get(SourceStatus.FAILED, 0),
                damaged=status.get(SourceStatus.DAMAGED, 0),
                documents=documents,
                chunks=chunk_count,
                tokens=tokens,
                segments=segments,
                bytes_on_disk=folder_bytes(self._folder),
            )

    def sources(self, status: SourceStatus | None = None) -> list[SourceRecord]:
        """Return the known sources in order of URI, all or those with one status."""
        with self._snapshots.reading() as connection:
            found = sources.read_sources(connection)
        return [record for record in found if status is None or record.status is status]

    def source(self, uri: str) -> SourceRecord | None:
        """Return one source, or None where it is unknown."""
        with self._snapshots.reading() as connection:
            found = sources.read_sources(connection, "uri = ?", (sources.stored_uri(uri),))
        return found[0] if found else None

    def sources_with_content(self, content_sha256: str) -> list[SourceRecord]:
        """Return the sources whose visible documents come from this content: how a rename is recognised."""
        with self._snapshots.reading() as connection:
            return sources.read_sources(
                connection, "indexed_sha256 = ? AND status != ?", (content_sha256, SourceStatus.DAMAGED.value)
            )

    def document(self, doc_id: str) -> Document:
        """Return a document, joined from its chunks and checked against its id."""
        with self._snapshots.reading() as connection:
            return sources.read_document(connection, doc_id)

    def pages(self, doc_id: str) -> tuple[PageSpan, ...]:
        """Return the page spans of a document, empty for one without pages; its text is not read."""
        with self._snapshots.reading() as connection:
            return sources.read_pages(connection, doc_id)

    def document_recipe(self, doc_id: str) -> str | None:
        """Return the recipe a stored document was chunked with; None where it is absent or damaged."""
        with self._snapshots.reading() as connection:
            return sources.read_recipe(connection, doc_id)

    def links(self, doc_id: str) -> list[DocumentLink]:
        """Return every place where a document stands, first one first; empty where it is unknown."""
        with self._snapshots.reading() as connection:
            return sources.read_links(connection, "d.doc_id", doc_id)

    def source_documents(self, uri: str) -> list[DocumentLink]:
        """Return the documents of one source in their order; empty where it is unknown."""
        with self._snapshots.reading() as connection:
            return sources.read_links(connection, "s.uri", sources.stored_uri(uri))

    def chunks(self, row_ids: Sequence[int] | RowIds) -> list[StoredChunk]:
        """Return the chunks of these rows in the given order."""
        keys = [int(row_id) for row_id in row_ids]
        with self._snapshots.reading() as connection:
            return chunks.read_chunks(connection, "row_id", keys, self.generation)

    def chunks_by_id(self, chunk_ids: Sequence[str]) -> list[StoredChunk]:
        """Return the chunks with these ids in the given order."""
        with self._snapshots.reading() as connection:
            return chunks.read_chunks(connection, "chunk_id", list(chunk_ids), self.generation)

    def known_chunks(self, chunk_ids: Sequence[str]) -> set[str]:
        """Return which of these chunks are there."""
        with self._snapshots.reading() as connection:
            return chunks.read_known_chunks(connection, chunk_ids)

    def chunk_at(self, doc_id: str, index: int) -> StoredChunk | None:
        """Return chunk `index` of a document, or None beyond its ends."""
        with self._snapshots.reading() as connection:
            return chunks.read_chunk_at(connection, doc_id, index)

    def row_ids(self) -> RowIds:
        """Return the row ids of all chunks, ascending."""
        with self._snapshots.reading() as connection:
            return chunks.read_row_ids(connection)

    def match(self, fts_query: str, limit: int, allowed: RowIds | None = None) -> tuple[RowIds, Vectors]:
        """Return row ids and BM25 scores (float32, higher is better) of the best `limit` chunks, best first."""
        with self._snapshots.reading() as connection:
            return fulltext.search_text(connection, fts_query, limit, allowed)

    def fts_tokens(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the full-text index's own terms of each text, in order."""
        if self._tokenizer is None or self._tokenizer.pid != os.getpid():  # a forked child may inherit a held mutex
            self._tokenizer = fulltext.FtsTokenizer(self.meta.fts_tokenizer)
        return self._tokenizer.tokens(texts)

    def document_frequency(self, terms: Sequence[str]) -> dict[str, int]:
        """Return for each term the number of chunks that hold it, after the index's own tokenising and stemming."""
        tokens = self.fts_tokens(terms)
        with self._snapshots.reading() as connection:
            counts = self._term_counts.read(connection, self.generation, {t for found in tokens for t in found})
        return {
            term: min((counts.get(token, 0) for token in found), default=0)
            for term, found in zip(terms, tokens, strict=True)
        }

    def rows_where(self, filters: Mapping[str, MetadataValue]) -> RowIds:
        """Return the sorted row ids of chunks of documents that fulfil every filter."""
        with self._snapshots.reading() as connection:
            return filter_row_ids(connection, filters)

    def vectors(self) -> VectorTable:
        """Return every live vector, memory-mapped. Checksums are verified once per process and file."""
        with self._snapshots.reading() as connection:
            dim = int(read_meta(connection, "dim", "0"))
            return vectors.read_vectors(connection, self._folder, self.generation, dim)

    def index_record(self) -> IndexRecord | None:
        """Return the recorded derived index, or None. Its file is not checked: `checked_index` does that."""
        with self._snapshots.reading() as connection:
            return derived.read_index(connection, self._folder)

    def checked_index(self) -> IndexRecord | None:
        """Return the recorded index if its file is there and its sha256 is right; else None, with a logged warning."""
        with self._snapshots.reading():
            record = self.index_record()
            return record if record is not None and derived.is_intact(record) else None

    def kv_entries(self, keys: Sequence[str]) -> dict[str, tuple[Path, KVEntry]]:
        """Return where the known ones of these KV keys lie."""
        with self._snapshots.reading() as connection:
            return derived.read_kv(connection, self._folder, keys)

    def kv_listing(self) -> list[tuple[Path, KVEntry]]:
        """Return where every stored KV lies, oldest first."""
        with self._snapshots.reading() as connection:
            return derived.list_kv(connection, self._folder)

    def kv_totals(self) -> KVTotals:
        """Return how much chunk KV is stored."""
        with self._snapshots.reading() as connection:
            return derived.total_kv(connection)

    @contextlib.contextmanager
    def writer(self, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[Writer]:
        """Give the one writer of this store; see `StoreWriter`.

        Raises:
            StoreLockedError: another process writes for longer than the time-out; names it.
        """
        from ragkit.store.writer import open_writer

        with open_writer(self._folder, lock_timeout_s) as writer:
            yield writer

    def gc(
        self,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        reader_timeout_s: float = 2.0,
        *,
        forget_kv: Sequence[str] = (),
    ) -> GcReport:
        """Remove what nothing references, rewrite segments under 50% live rows, and return what that freed.

        The KV of the keys `forget_kv` is forgotten before.

        Files stay (`pending_files`) while any reader of any process has a generation pinned.
        """
        with self.writer(lock_timeout_s) as writer:
            return writer.collect(reader_timeout_s, forget_kv)

    def verify(self, *, repair: bool = False, lock_timeout_s: float = LOCK_TIMEOUT_S) -> VerifyReport:
        """Read every byte of the store and return what is damaged; damage itself never raises.

        `repair` mends what can be made anew and marks the sources of the rest `damaged` (`VerifyReport.marked`), so
        that the next ingest reads them again. For a catalogue that `open` refuses there is `verify_store(folder)`.
        """
        from ragkit.store.repair import repair_store
        from ragkit.store.verify import verify_store

        report = verify_store(self._folder)
        if not repair or not report.problems:
            return report
        with self.writer(lock_timeout_s) as writer:
            marked = writer.mend(lambda changes: repair_store(changes, report))
        return replace(report, marked=marked)


def _is_outdated(folder: Path, connection: sqlite3.Connection) -> bool:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if not tables:  # a creation that was cut short
        raise missing_store(folder)
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID or "meta" not in tables:
        raise StoreFormatError(f"{folder / DATABASE} is no ragkit catalogue: name another folder with --store")
    return upgrade.check_version(folder, int(read_meta(connection, "format_version")))


def _create(folder: Path, fts_tokenizer: str) -> None:
    uri = (folder.resolve() / DATABASE).as_uri() + "?mode=rwc"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    try:
        if connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
            raise StoreError(f"there is a store in {folder} already: open it, or name another folder with --store")
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"the file system of {folder} does not support SQLite's write-ahead log: use a local disk")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            create_tables(connection, fts_tokenizer)
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
    finally:
        connection.close()
