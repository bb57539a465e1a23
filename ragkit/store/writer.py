"""The one writer of a store. See `StoreWriter` for the contract."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.errors import EmbedderMismatchError, StoreError, UsageError
from ragkit.store import cleaning, derived, embeddings, publishing
from ragkit.store.changes import Changes, DocumentRows
from ragkit.store.connections import connect, translated
from ragkit.store.groups import check_group, group_bytes
from ragkit.store.locks import WriterLock
from ragkit.store.records import (
    CommitReport,
    DocumentSpans,
    GcReport,
    IndexedDocument,
    IndexRecord,
    KnownDocument,
    KVEntry,
    SourceStatus,
    SourceUpdate,
)
from ragkit.store.rows import SegmentRow, to_sql
from ragkit.store.schema import set_meta
from ragkit.store.segments import segment_path, write_vector_segment
from ragkit.store.snapshots import WRITER_LOCK, read_meta
from ragkit.store.staging import Staging
from ragkit.store.transactions import Transactions
from ragkit.types import Metadata, MetadataValue

if TYPE_CHECKING:
    from ragkit.store.records import RowIds, Vectors

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_writer(folder: Path, lock_timeout_s: float) -> Iterator[Writer]:
    """Give the writer of the store in `folder`; an erasure that was cut short is finished first.

    Raises:
        StoreLockedError: another process writes for longer than the time-out; names it.
    """
    with translated(folder):
        lock = WriterLock(folder / WRITER_LOCK, lock_timeout_s)
    try:
        with translated(folder):
            connection = connect(folder, writable=True)
        try:
            writer = Writer(folder, connection, lock)
        except BaseException:
            connection.close()
            raise
        try:
            try:
                writer.finish_what_was_cut_short()
            except StoreError as error:  # damage must not keep a repair from starting
                _log.warning("what was cut short in %s could not be finished yet: %s", folder, error)
            yield writer
        finally:
            writer.close()
    finally:
        lock.release()


class Writer:
    """Writes a store while it holds the lock; made by `Store.writer`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: WriterLock) -> None:
        self._folder = folder
        self._connection = connection
        self._transactions = Transactions(folder, connection, lock)
        self._opened_staging: Staging | None = None

    def configure(
        self, *, embedder_id: str, dim: int, chunker: str, chunker_fingerprint: str, tokenizer_id: str
    ) -> None:
        """Record what the following commits are made with."""
        wanted = {
            "embedder_id": embedder_id,
            "dim": str(dim),
            "chunker": chunker,
            "chunker_fingerprint": chunker_fingerprint,
            "tokenizer_id": tokenizer_id,
        }
        with translated(self._folder):
            known = {key: read_meta(self._connection, key, "") for key in wanted}
            filled = self._connection.execute("SELECT 1 FROM chunks LIMIT 1").fetchone() is not None
        if filled and (known["embedder_id"], known["dim"]) != (embedder_id, str(dim)):
            raise EmbedderMismatchError(
                f"the store {self._folder} was built with the embedder {known['embedder_id']} (dimension "
                f"{known['dim']}), not with {embedder_id} (dimension {dim}): embed everything anew with --reembed, "
                "or use another --store"
            )
        if known != wanted:
            with self._transactions.open() as changes:
                for key, value in wanted.items():
                    set_meta(changes.connection, key, value)
            self._close_staging()

    def commit(self, group: Sequence[SourceUpdate]) -> CommitReport:
        """Store one commit group and return what it did."""
        with translated(self._folder):
            check_group(group, int(read_meta(self._connection, "dim", "0")))
        if any(update.more or (update.failure is None and self._staging.has_begun(update.uri)) for update in group):
            return self._commit_part(group)
        with translated(self._folder):
            next_row = int(read_meta(self._connection, "last_row_id")) + 1
            new = self._new_documents(group, next_row)
            before = {update.uri: self._is_visible(update.uri) for update in group}
        rows = sum(len(item.indexed.chunks) for item in new.values())
        needed = group_bytes(group)
        with translated(self._folder, needed):
            segment = self._write_segment(list(new.values()), next_row, rows)
        with self._transactions.open(needed) as changes:
            if segment is not None:
                changes.put_segment(segment)
                set_meta(changes.connection, "last_row_id", str(next_row + rows - 1))
            keys = {doc_id: changes.put_document(item) for doc_id, item in new.items()}
            for update in group:
                self._apply(changes, update, keys)
            generation = changes.generation
        heirs = changes.heirs
        failed = tuple(update.uri for update in group if update.failure is not None)
        for uri in failed:
            self._staging.interrupt(uri)
        stored = [update.uri for update in group if update.failure is None]
        for uri in stored:
            self._staging.forget(uri)
        added = tuple(uri for uri in stored if not before[uri])
        return CommitReport(generation, added, tuple(uri for uri in stored if before[uri]), failed, rows, heirs)

    def staged_recipe(self, doc_id: str) -> str | None:
        """Return the recipe of a document that came with a part of a source and is not published yet, or None."""
        return self._staging.recipe(doc_id)

    def close(self) -> None:
        """Let go of the store's files; what waits to be published is kept."""
        self._close_staging()
        self._connection.close()

    def relink(self, old_uri: str, new_uri: str, *, size: int, mtime_ns: int) -> None:
        """Rename a source and its documents' URIs without touching chunks and vectors."""
        self._require([old_uri])
        with translated(self._folder):
            if self._source_id(new_uri) is not None:
                raise UsageError(f"{new_uri} is known already: commit its new content instead of renaming {old_uri}")
        with self._transactions.open() as changes:
            changes.rename_links(old_uri, new_uri)
            changes.move_source(old_uri, moved_to=new_uri, size=size, mtime_ns=mtime_ns)

    def touch(self, uri: str, *, size: int, mtime_ns: int) -> None:
        """Record a new size and time of a source whose content is unchanged."""
        self._require([uri])
        with self._transactions.open(same_generation=True) as changes:
            changes.move_source(uri, size=size, mtime_ns=mtime_ns)

    def remove(self, uris: Sequence[str], *, erase: bool = False, reader_timeout_s: float = 30.0) -> tuple[str, ...]:
        """Forget sources and what only they link to; `erase` overwrites it in every file."""
        unique = tuple(dict.fromkeys(uris))
        keys = self._require(unique)
        if erase:
            with translated(self._folder):
                # what a pinned reader keeps the catalogue's rewriting from reaching is zeroed in its pages already
                self._connection.execute("PRAGMA secure_delete = ON")
        with self._transactions.open() as changes:
            for source_id in keys:
                changes.drop_source(source_id)
            if erase:
                set_meta(changes.connection, cleaning.ERASE_PENDING, "1")
                changes.rebuild_full_text()  # "deleted" words linger in the index until it is made anew
        if erase:
            self.finish_erasure(reader_timeout_s)
        return unique

    def finish_what_was_cut_short(self) -> None:
        """End an erasure that waits, and forget what was published when the process that did so was killed."""
        self.finish_erasure(timeout_s=0.0)
        with translated(self._folder):
            publishing.forget_published(self._connection, self._staging)

    def finish_erasure(self, timeout_s: float) -> None:
        """Overwrite what an erasure has unlinked, if one is unfinished.

        Raises:
            StoreLockedError: readers pinned older generations for the whole of a time-out above 0.
        """
        with translated(self._folder):
            pending = read_meta(self._connection, cleaning.ERASE_PENDING, "0") == "1"
        if pending:
            self._staging.drop()
            cleaning.scrub(self._folder, self._connection, self._transactions, timeout_s)

    def reset_embeddings(
        self, *, embedder_id: str, dim: int, embed: Callable[[Sequence[DocumentSpans]], Vectors], batch_rows: int = 4096
    ) -> int:
        """Replace every vector and the embedder's identity in one transaction; return the number of rows."""
        rows = embeddings.replace_vectors(
            self._folder, self._connection, self._transactions, embedder_id, dim, embed, batch_rows
        )
        self._staging.drop()
        self._close_staging()
        return rows

    def set_index(
        self,
        *,
        generation: int,
        row_ids: RowIds,
        kind: str,
        params: Mapping[str, MetadataValue],
        write: Callable[[Path], None],
    ) -> IndexRecord:
        """Store a derived index: `write` fills a temporary file, the rest is durable."""
        with translated(self._folder):
            record = derived.write_index(self._folder, generation, row_ids, kind, params, write)
        with self._transactions.open(same_generation=True) as changes:
            derived.put_index(changes.connection, record)
        cleaning.remove_unreferenced(self._folder, self._connection, timeout_s=0.0)
        return record

    def add_kv(self, parts: Iterable[bytes | memoryview], entries: Sequence[KVEntry]) -> str:
        """Store one KV segment and where its chunks lie in it; return its sha256."""
        with translated(self._folder):
            segment = derived.write_kv(self._folder, parts, entries)
        with self._transactions.open(same_generation=True) as changes:
            derived.put_kv(changes, segment, entries)
        return segment.sha256

    def record_kv(self, segment: SegmentRow, entries: Sequence[KVEntry]) -> None:
        """Record a KV segment that another process has written into the store's folder, and where its chunks lie."""
        path = segment_path(self._folder, segment.sha256, segment.kind)
        with translated(self._folder):
            if path.stat().st_size != segment.bytes:
                raise StoreError(f"the segment {path.name} does not have the {segment.bytes} bytes that were written")
        with self._transactions.open(same_generation=True) as changes:
            derived.put_kv(changes, segment, entries)

    def remove_kv(self, keys: Sequence[str]) -> None:
        """Forget KV entries; a segment goes with its last one."""
        with self._transactions.open(same_generation=True) as changes:
            derived.drop_kv(changes, keys)
        cleaning.remove_unreferenced(self._folder, self._connection, timeout_s=0.0)

    def collect(self, reader_timeout_s: float, forget_kv: Sequence[str] = ()) -> GcReport:
        """Forget some KV, rewrite sparse segments and remove what nothing references: `Store.gc`."""
        if forget_kv:
            with self._transactions.open(same_generation=True) as changes:
                derived.drop_kv(changes, forget_kv)
        waiting = self._staging.bytes_on_disk
        self._staging.drop()
        report = cleaning.collect(self._folder, self._connection, self._transactions, reader_timeout_s)
        return replace(report, bytes_freed=report.bytes_freed + waiting)

    def mend(self, mend: Callable[[Changes], tuple[str, ...]]) -> tuple[str, ...]:
        """Run the steps of `Store.repair` in one transaction and return the sources to read again."""
        with self._transactions.open() as changes:
            return mend(changes)

    def _new_documents(self, group: Sequence[SourceUpdate], next_row: int) -> dict[str, DocumentRows]:
        """Return the documents of a group that are not stored as they are, with the row ids that they get."""
        new: dict[str, DocumentRows] = {}
        for update in group:
            for item in update.documents:
                if isinstance(item, IndexedDocument):
                    doc_id = item.document.doc_id
                    if doc_id not in new and not self._is_stored(item):
                        new[doc_id] = DocumentRows(item, update.recipe, next_row)
                        next_row += len(item.chunks)
                elif item.doc_id not in new and self._document_key(item.doc_id) is None:
                    waiting = self._staging.document(item.doc_id)
                    if waiting is None:
                        raise _not_stored(item)
                    new[item.doc_id] = DocumentRows(waiting, update.recipe, next_row)
                    next_row += len(waiting.chunks)
        return new

    def _commit_part(self, group: Sequence[SourceUpdate]) -> CommitReport:
        """Keep a part of a source, or with its last one make all of it visible."""
        update = group[0]
        if len(group) > 1:
            raise UsageError(f"{update.uri} or its neighbours come in parts: commit each part by itself")
        with translated(self._folder):
            for item in update.documents:
                if isinstance(item, KnownDocument) and not self._is_there(item.doc_id):
                    raise _not_stored(item)
            before = self._is_visible(update.uri)
            generation = int(read_meta(self._connection, "generation"))
        self._staging.add(update)
        if update.more:
            return CommitReport(generation, (), (), (), 0)
        generation, rows, heirs = publishing.publish(
            self._folder, self._connection, self._transactions, self._staging, update, self._is_stored
        )
        self._staging.forget(update.uri)
        stored = (update.uri,)
        return CommitReport(generation, () if before else stored, stored if before else (), (), rows, heirs)

    def _is_there(self, doc_id: str) -> bool:
        return self._document_key(doc_id) is not None or self._staging.recipe(doc_id) is not None

    @property
    def _staging(self) -> Staging:
        if self._opened_staging is None:
            with translated(self._folder):
                embedder_id, dim = (read_meta(self._connection, key, "") for key in ("embedder_id", "dim"))
                self._opened_staging = Staging(self._folder, embedder_id, int(dim or 0))
        return self._opened_staging

    def _close_staging(self) -> None:
        if self._opened_staging is not None:
            self._opened_staging.close()
            self._opened_staging = None

    def _write_segment(self, new: Sequence[DocumentRows], first_row: int, rows: int) -> SegmentRow | None:
        if rows == 0:
            return None
        import numpy as np

        vectors = np.concatenate([item.indexed.vectors for item in new])
        return write_vector_segment(self._folder, np.arange(first_row, first_row + rows, dtype=np.int64), vectors)

    def _apply(self, changes: Changes, update: SourceUpdate, keys: Mapping[str, int]) -> None:
        source_id = changes.put_source(update)
        if update.failure is not None:
            return
        links: list[tuple[int, str, Metadata]] = []
        for item in update.documents:
            if isinstance(item, IndexedDocument):
                doc_id, uri, metadata = item.document.doc_id, item.document.uri, item.document.metadata
            else:
                doc_id, uri, metadata = item.doc_id, item.uri, item.metadata
            doc_key = keys.get(doc_id)
            if doc_key is None:
                doc_key = self._document_key(doc_id)
                assert doc_key is not None
                changes.rewrite_document(doc_key, recipe=update.recipe)
            links.append((doc_key, uri, metadata))
        changes.drop_links(source_id)
        changes.link(source_id, links)

    def _is_stored(self, item: IndexedDocument) -> bool:
        """Whether a document is stored undamaged with exactly these chunks."""
        doc_key = self._document_key(item.document.doc_id)
        if doc_key is None:
            return False
        sql = "SELECT chunk_id, token_count FROM chunks WHERE doc_key = ? ORDER BY idx"
        stored = self._connection.execute(sql, (doc_key,)).fetchall()
        return stored == [(chunk.chunk_id, chunk.token_count) for chunk in item.chunks]

    def _document_key(self, doc_id: str) -> int | None:
        sql = "SELECT doc_key FROM documents WHERE doc_id = ? AND NOT damaged"
        row = self._connection.execute(sql, (doc_id,)).fetchone()
        return None if row is None else int(row[0])

    def _source_id(self, uri: str) -> int | None:
        row = self._connection.execute("SELECT source_id FROM sources WHERE uri = ?", (to_sql(uri),)).fetchone()
        return None if row is None else int(row[0])

    def _is_visible(self, uri: str) -> bool:
        """Whether a source has been indexed before."""
        sql = "SELECT 1 FROM sources WHERE uri = ? AND (indexed_sha256 != '' OR status = ?)"
        return self._connection.execute(sql, (to_sql(uri), SourceStatus.OK.value)).fetchone() is not None

    def _require(self, uris: Sequence[str]) -> list[int]:
        with translated(self._folder):
            keys = [(uri, self._source_id(uri)) for uri in uris]
        missing = [uri for uri, key in keys if key is None]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UsageError(f"{missing[0]!r}{more} is not in the store: `ragkit ls` lists the sources")
        return [key for _, key in keys if key is not None]


def _not_stored(item: KnownDocument) -> UsageError:
    return UsageError(f"{item.uri}: document {item.doc_id} is not stored: give its chunks and vectors")
