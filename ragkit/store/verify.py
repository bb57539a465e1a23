"""Reads every byte of a store and lists what is damaged.

SQLite itself notices broken structure (`integrity_check`), not changed content; the row checksums, the documents' ids
and the files' sha256 do. Nothing here raises because of damage.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ragkit.errors import StoreCorruptError, StoreError
from ragkit.store.connections import connect, translated
from ragkit.store.derived import read_index
from ragkit.store.files import digest_file
from ragkit.store.locks import read_witness
from ragkit.store.records import Problem, VerifyReport
from ragkit.store.rows import SEGMENT_COLUMNS, SegmentRow, filter_rows, from_sql, pages_from_json, row_crc
from ragkit.store.schema import APPLICATION_ID, create_tables, schema_sql
from ragkit.store.segments import VECTOR_SEGMENT, forget_verified, live_mask, segment_path, segment_row_ids
from ragkit.store.snapshots import WRITER_LOCK, Snapshots, read_meta, require_store
from ragkit.store.sources import DOCUMENT_COLUMNS, LINK_COLUMNS, SOURCE_COLUMNS, joined_text
from ragkit.types import document_id

READ_AGAIN = "run `ragkit verify --repair`, then ingest its source again"
COMPUTED_AGAIN = "run `ragkit verify --repair`: the KV is computed again when it is needed"
NEW_STORE = "ingest the sources into a new store"


def verify_store(folder: Path) -> VerifyReport:
    """Return every damage of the store in `folder`; works on catalogues that `Store.open` refuses.

    Raises:
        StoreMissingError: there is no catalogue at all.
    """
    require_store(folder)
    forget_verified()
    snapshots = Snapshots(folder)
    found = _Findings()
    try:
        with snapshots.reading() as connection:
            found.generation = snapshots.generation()
            _Verifier(folder, connection, found).run()
    except (StoreError, ValueError) as error:
        found.add("catalogue", "ragkit.db", str(error), NEW_STORE)
    else:
        _full_text(folder, found)
    finally:
        snapshots.close()
    return VerifyReport(found.generation, found.documents, found.chunks, found.bytes_read, tuple(found.problems))


class _Findings:
    """What has been looked at and found so far."""

    def __init__(self) -> None:
        self.generation = 0
        self.documents = 0
        self.chunks = 0
        self.bytes_read = 0
        self.problems: list[Problem] = []

    def add(self, part: str, name: str, message: str, remedy: str, uris: Sequence[str] = (), key: int = 0) -> None:
        """Add a problem."""
        self.problems.append(Problem(part, name, message, remedy, tuple(uris), key))


class _Verifier:
    """Checks one pinned generation, part by part; damage in one part does not keep the others from being read."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, found: _Findings) -> None:
        self._folder = folder
        self._connection = connection
        self._found = found

    def run(self) -> None:
        """Check everything that can be checked without writing."""
        parts: dict[str, Callable[[], None]] = {
            "catalogue": self._structure,
            "meta": self._meta,
            "source": self._sources,
            "document": self._documents,
            "link": self._links,
            "segment": self._segments,
            "vectors": self._live_rows,
            "kv": self._kv,
            "index": self._index,
        }
        for part, check in parts.items():
            with self._guarded(part):
                check()

    @contextlib.contextmanager
    def _guarded(self, part: str) -> Iterator[None]:
        """Turn whatever a damaged value causes into a problem of its part."""
        try:
            with translated(self._folder):
                yield
        except (StoreError, ValueError, TypeError, OverflowError, MemoryError) as error:
            self._found.add(part, "ragkit.db", f"cannot be read: {error}", NEW_STORE)

    def _structure(self) -> None:
        for (message,) in self._connection.execute("PRAGMA integrity_check(20)"):
            if message != "ok":
                self._found.add(
                    "catalogue", "ragkit.db", str(message), f"run `ragkit verify --repair`; else {NEW_STORE}"
                )
        for table, row_id, parent, _ in self._connection.execute("PRAGMA foreign_key_check"):
            self._found.add("catalogue", f"{table} row {row_id}", f"refers to nothing in {parent}", NEW_STORE)
        (mode,) = self._connection.execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
            self._found.add("catalogue", "ragkit.db", f"its header says journal mode {mode}, not wal", NEW_STORE)
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        if application != APPLICATION_ID:
            self._found.add("catalogue", "ragkit.db", "its header is not that of a ragkit catalogue", NEW_STORE)
        memory = sqlite3.connect(":memory:")
        try:
            create_tables(memory, read_meta(self._connection, "fts_tokenizer"))
            if schema_sql(memory) != schema_sql(self._connection):
                self._found.add(
                    "catalogue", "ragkit.db", "its table definitions are not those of this format", NEW_STORE
                )
        finally:
            memory.close()

    def _meta(self) -> None:
        for key, value, crc in self._connection.execute("SELECT key, value, crc FROM meta"):
            if row_crc(key, value) != crc:
                self._found.add("meta", str(key), "does not match its checksum", NEW_STORE)
        committed = int(read_witness(self._folder / WRITER_LOCK).get("generation", 0))
        if committed > self._found.generation:
            self._found.add(
                "catalogue",
                "ragkit.db-wal",
                f"generation {committed} was committed, the catalogue ends at {self._found.generation}: "
                "its write-ahead log was lost or damaged",
                "ingest again what was ingested last",
            )
        last = int(read_meta(self._connection, "last_row_id"))
        (highest,) = self._connection.execute("SELECT ifnull(max(row_id), 0) FROM chunks").fetchone()
        if highest > last:
            self._found.add("meta", "last_row_id", f"is {last}, but row {highest} exists", NEW_STORE)

    def _sources(self) -> None:
        for *values, crc in self._connection.execute(f"SELECT {SOURCE_COLUMNS}, crc FROM sources"):  # noqa: S608
            if row_crc(*values) != crc:
                uri = _text(values[1])
                self._found.add("source", uri, "its row does not match its checksum", READ_AGAIN, (uri,), values[0])

    def _documents(self) -> None:
        sql = f"SELECT {DOCUMENT_COLUMNS}, crc FROM documents"  # noqa: S608
        for *values, crc in self._connection.execute(sql).fetchall():
            doc_key, doc_id = values[0], _text(values[1])
            self._found.documents += 1
            reason = "its row does not match its checksum" if row_crc(*values) != crc else self._document(values)
            if reason:
                uris = self._uris("l.doc_key = ?", (doc_key,))
                self._found.add("document", doc_id, reason, READ_AGAIN, uris, doc_key)
        self._lost_chunks()

    def _document(self, values: Sequence[object]) -> str:
        """Return what is wrong with the text of a document whose own row is right; "" for nothing."""
        doc_key, doc_id, pages = int(str(values[0])), values[1], pages_from_json(str(values[6]))
        sql = "SELECT count(*), ifnull(sum(token_count), 0) FROM chunks WHERE doc_key = ?"
        count, tokens = self._connection.execute(sql, (doc_key,)).fetchone()
        self._found.chunks += count
        try:
            text = joined_text(self._connection, doc_key)
        except (StoreCorruptError, sqlite3.Error, ValueError) as error:
            return str(error)
        self._found.bytes_read += len(text)
        if (len(text), count, tokens) != (values[3], values[4], values[5]):
            return f"{count} chunks with {len(text)} characters are left of {values[4]} with {values[3]}"
        return "" if document_id(text, pages) == doc_id else "its text does not match its id"

    def _lost_chunks(self) -> None:
        sql = "SELECT count(*) FROM chunks WHERE doc_key NOT IN (SELECT doc_key FROM documents)"
        (count,) = self._connection.execute(sql).fetchone()
        if count:
            self._found.add("document", "?", f"{count} chunks belong to no document", NEW_STORE)

    def _links(self) -> None:
        values_of: dict[int, set[tuple[object, ...]]] = {}
        for row in self._connection.execute("SELECT link_id, key, value FROM link_values"):
            values_of.setdefault(row[0], set()).add(row)
        for *values, crc in self._connection.execute(f"SELECT {LINK_COLUMNS}, crc FROM links").fetchall():  # noqa: S608
            link_id, uri = values[0], _text(values[4])
            uris = self._uris("l.link_id = ?", (link_id,))
            filters = values_of.pop(link_id, set())
            if row_crc(*values) != crc:
                self._found.add("link", uri, "its row does not match its checksum", READ_AGAIN, uris, link_id)
            elif filters != set(filter_rows(link_id, json.loads(values[5]))):
                remedy = "run `ragkit verify --repair`"
                self._found.add("filter", uri, "what filters compare is not its metadata", remedy, uris, link_id)
        for link_id in values_of:
            self._found.add(
                "filter", f"link {link_id}", "filters name a link that is gone", "run `ragkit verify --repair`"
            )

    def _segments(self) -> None:
        for *values, crc in self._connection.execute(f"SELECT {SEGMENT_COLUMNS}, crc FROM segments").fetchall():  # noqa: S608
            segment = SegmentRow(*values)
            reason = "its row does not match its checksum" if segment.crc != crc else self._segment_file(segment)
            if reason:
                rows = (segment.first_row, segment.last_row)
                where = "l.doc_key IN (SELECT doc_key FROM chunks WHERE row_id BETWEEN ? AND ?)"
                of_vectors = segment.kind == VECTOR_SEGMENT
                uris = self._uris(where, rows) if of_vectors else ()
                remedy = READ_AGAIN if of_vectors else COMPUTED_AGAIN
                self._found.add("segment", _text(segment.sha256), reason, remedy, uris, segment.segment_id)

    def _segment_file(self, segment: SegmentRow) -> str:
        path = segment_path(self._folder, segment.sha256, segment.kind)
        try:
            digest = digest_file(path)
        except OSError as error:
            return f"its file cannot be read ({error})"
        self._found.bytes_read += digest.size
        return "" if digest.sha256 == segment.sha256 else "its file does not match its sha256"

    def _live_rows(self) -> None:
        """Compare the rows that have vectors with those that have text."""
        import numpy as np

        live = [np.empty(0, dtype=np.int64)]
        for *values, crc in self._connection.execute(f"SELECT {SEGMENT_COLUMNS}, crc FROM segments").fetchall():  # noqa: S608
            segment = SegmentRow(*values)
            if segment.kind == VECTOR_SEGMENT and segment.crc == crc:
                live.append(segment_row_ids(segment)[live_mask(segment)])
        sql = "SELECT row_id FROM chunks JOIN documents USING (doc_key)"
        every = np.array([row for (row,) in self._connection.execute(sql)], dtype=np.int64)
        whole = np.array([row for (row,) in self._connection.execute(f"{sql} WHERE NOT damaged")], dtype=np.int64)
        vectors = np.concatenate(live)
        without, beyond = np.setdiff1d(whole, vectors), np.setdiff1d(vectors, every)
        if len(np.unique(vectors)) != len(vectors):
            self._found.add("vectors", "segments", "a row has two vectors", "embed everything anew with --reembed")
        if len(beyond):
            remedy = "embed everything anew with --reembed"
            self._found.add("vectors", f"row {beyond[0]}", f"{len(beyond)} vectors have no text", remedy)
        if len(without):
            where = "l.doc_key = (SELECT doc_key FROM chunks WHERE row_id = ?)"
            uris = sorted({uri for row in without.tolist() for uri in self._uris(where, (row,))})
            message = f"{len(without)} chunks have no vector"
            self._found.add("vectors", f"row {without[0]}", message, READ_AGAIN, uris, int(without[0]))

    def _kv(self) -> None:
        columns = "kv_id, key, chunk_id, segment_id, offset, bytes, crc32, crc"
        for *values, crc in self._connection.execute(f"SELECT {columns} FROM kv"):  # noqa: S608
            if row_crc(*values) != crc:
                name, reason = _text(values[1]), "its row does not match its checksum"
                self._found.add("kv", name, reason, COMPUTED_AGAIN, (), values[0])

    def _index(self) -> None:
        record = read_index(self._connection, self._folder)
        if record is None:
            return
        try:
            digest = digest_file(record.path)
            self._found.bytes_read += digest.size
            reason = "" if digest.sha256 == record.sha256 else "its file does not match its sha256"
        except OSError as error:
            reason = f"its file cannot be read ({error})"
        if reason:
            self._found.add("index", record.path.name, reason, "none needed: it is built anew from the vectors")

    def _uris(self, where: str, values: Sequence[object]) -> tuple[str, ...]:
        sql = f"SELECT DISTINCT s.uri FROM links l JOIN sources s USING (source_id) WHERE {where} ORDER BY s.uri"  # noqa: S608
        with contextlib.suppress(sqlite3.Error):
            return tuple(_text(uri) for (uri,) in self._connection.execute(sql, values))
        return ()


def _full_text(folder: Path, found: _Findings) -> None:
    """Let FTS5 compare its index with the text of the chunks; it asks for the catalogue's write lock to do so."""
    remedy = "run `ragkit verify --repair`: it is made anew from the chunks"
    try:
        with translated(folder), contextlib.closing(connect(folder, writable=True)) as connection:
            connection.execute("INSERT INTO chunk_fts (chunk_fts, rank) VALUES ('integrity-check', 1)")
    except StoreCorruptError:
        found.add("full_text", "chunk_fts", "the full-text index does not match the text of the chunks", remedy)
    except StoreError as error:
        found.add("full_text", "chunk_fts", f"could not be checked: {error}", "run `ragkit verify` again")


def _text(value: object) -> str:
    """Return something printable for a value that may have rotted into any type."""
    return from_sql(value) if isinstance(value, str) else ascii(value)
