"""Documents of large sources that no reader sees yet: a job commits them part by part, and publishes all at once.

They lie in a catalogue of their own beside the store's, with their vectors, so that a job that is cut off finds them
again. A document counts by its id, whichever source brought it; which ones a source has is said anew by each job.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from ragkit.errors import StoreCorruptError
from ragkit.store import faults
from ragkit.store.connections import BUSY_TIMEOUT_MS, translated
from ragkit.store.records import IndexedDocument, SourceUpdate
from ragkit.store.rows import from_sql, metadata_to_json, pages_from_json, pages_to_json, to_sql
from ragkit.types import Chunk, Document, Metadata

STAGED = "staged.db"

_DOCUMENT_COLUMNS = "doc_id, text, facts, vectors, crc"

_TABLES = (
    "CREATE TABLE built_with (embedder_id TEXT NOT NULL, dim INTEGER NOT NULL)",
    "CREATE TABLE sources (source_id INTEGER PRIMARY KEY, uri TEXT NOT NULL UNIQUE, content_sha256 TEXT NOT NULL, "
    "recipe TEXT NOT NULL)",
    "CREATE TABLE documents (doc_key INTEGER PRIMARY KEY, doc_id TEXT NOT NULL UNIQUE, source_id INTEGER NOT NULL, "
    "recipe TEXT NOT NULL, text BLOB NOT NULL, facts TEXT NOT NULL, vectors BLOB NOT NULL, crc INTEGER NOT NULL)",
    "CREATE TABLE links (source_id INTEGER NOT NULL, position INTEGER NOT NULL, doc_id TEXT NOT NULL, "
    "uri TEXT NOT NULL, metadata TEXT NOT NULL, PRIMARY KEY (source_id, position)) WITHOUT ROWID",
    "CREATE INDEX links_by_document ON links (doc_id, source_id)",
)


class Staging:
    """What waits in one store folder. Only the holder of the writer's lock may use it; the file is made by `add`.

    Args:
        folder: the store's.
        embedder_id, dim: of the store's vectors; what others made is dropped.
    """

    def __init__(self, folder: Path, embedder_id: str, dim: int) -> None:
        self._folder = folder
        self._built_with = (embedder_id, dim)
        self._connection: sqlite3.Connection | None = None
        self._begun: set[str] = set()
        if self.path.exists():
            self._connection = self._checked()

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self._folder / STAGED

    @property
    def bytes_on_disk(self) -> int:
        """How large it is; 0 where nothing waits."""
        return self.path.stat().st_size if self.path.exists() else 0

    def has_begun(self, uri: str) -> bool:
        """Return whether this job has brought a part of a source, and not the last one."""
        return uri in self._begun

    def add(self, update: SourceUpdate) -> None:
        """Keep one more part of a source, durably; its first one of a job takes the place of what others began.

        Raises:
            StoreSpaceError: the disk is full; the parts before this one are kept.
        """
        with translated(self._folder):
            if self._connection is None:
                self._connection = self._created()
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                source_id = _put_source(connection, update)
                if update.uri not in self._begun:
                    connection.execute("DELETE FROM links WHERE source_id = ?", (source_id,))
                _put_documents(connection, source_id, update)
                _put_links(connection, source_id, update)
                faults.checkpoint("staging:commit", self.path)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        self._begun.add(update.uri)

    def recipe(self, doc_id: str) -> str | None:
        """Return the recipe that a waiting document was chunked with; None where it does not wait."""
        row = self._row("SELECT recipe FROM documents WHERE doc_id = ?", (doc_id,))
        return None if row is None else str(row[0])

    def document(self, doc_id: str) -> IndexedDocument | None:
        """Return a waiting document, or None."""
        row = self._row(f"SELECT {_DOCUMENT_COLUMNS} FROM documents WHERE doc_id = ?", (doc_id,))  # noqa: S608 - our names
        return None if row is None else self._indexed(row)

    def documents(self, uri: str) -> Iterator[IndexedDocument]:
        """Yield the documents of a source that wait, in the order in which they came."""
        sql = (
            f"SELECT {_DOCUMENT_COLUMNS} FROM documents d WHERE EXISTS (SELECT 1 FROM links l "  # noqa: S608 - our names
            "JOIN sources s USING (source_id) WHERE s.uri = ? AND l.doc_id = d.doc_id) ORDER BY doc_key"
        )
        for row in self._rows(sql, (to_sql(uri),)):
            yield self._indexed(row)

    def links(self, uri: str) -> Iterator[tuple[str, str, Metadata]]:
        """Yield the id, URI and metadata of every document that a source will have, in order."""
        sql = (
            "SELECT l.doc_id, l.uri, l.metadata FROM links l JOIN sources s USING (source_id) WHERE s.uri = ? "
            "ORDER BY l.position"
        )
        for doc_id, document_uri, metadata in self._rows(sql, (to_sql(uri),)):
            yield doc_id, from_sql(document_uri), json.loads(metadata)

    def sources(self) -> list[tuple[str, str, str]]:
        """Return the URI, the content's digest and the recipe of every source that waits."""
        rows = self._rows("SELECT uri, content_sha256, recipe FROM sources", ())
        return [(from_sql(uri), content, recipe) for uri, content, recipe in rows]

    def interrupt(self, uri: str) -> None:
        """End what this job brings of a source; what has come is kept for the next one."""
        self._begun.discard(uri)

    def forget(self, uri: str) -> None:
        """Drop what a source has brought; the file goes with the last one."""
        self._begun.discard(uri)
        if self._connection is None:
            return
        with translated(self._folder):
            row = self._connection.execute("SELECT source_id FROM sources WHERE uri = ?", (to_sql(uri),)).fetchone()
            if row is None:
                return
            if self._connection.execute("SELECT count(*) FROM sources").fetchone()[0] > 1:
                self._connection.execute("BEGIN IMMEDIATE")
                for table in ("links", "documents", "sources"):
                    self._connection.execute(f"DELETE FROM {table} WHERE source_id = ?", row)  # noqa: S608 - our names
                self._connection.execute("COMMIT")
                return
        self.drop()

    def drop(self) -> None:
        """Drop everything that waits."""
        self._begun.clear()
        with translated(self._folder):
            self.close()
            if self.path.exists():
                faults.checkpoint("file:remove", self.path)
                _remove(self.path)

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _checked(self) -> sqlite3.Connection | None:
        """Return a connection to what is there, which is dropped where its vectors would not be the store's."""
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            _make_safe(connection)
            if connection.execute("SELECT embedder_id, dim FROM built_with").fetchone() == self._built_with:
                return connection
        except sqlite3.DatabaseError:  # its making was cut short, or it rotted: what it held is made again
            pass
        connection.close()
        _remove(self.path)
        return None

    def _created(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        _make_safe(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        for statement in _TABLES:
            connection.execute(statement)
        connection.execute("INSERT INTO built_with VALUES (?,?)", self._built_with)
        connection.execute("COMMIT")
        return connection

    def _row(self, sql: str, values: tuple[object, ...]) -> Any:
        with contextlib.closing(self._rows(sql, values)) as rows:
            return next(rows, None)

    def _rows(self, sql: str, values: tuple[object, ...]) -> Generator[Any]:
        cursor: sqlite3.Cursor | None = None
        while self._connection is not None:
            try:
                with translated(self._folder):
                    cursor = self._connection.execute(sql, values) if cursor is None else cursor
                    row = cursor.fetchone()
            except StoreCorruptError as error:
                raise self._damaged() from error
            if row is None:
                return
            yield row

    def _indexed(self, row: Sequence[Any]) -> IndexedDocument:
        import numpy as np

        doc_id, content, facts, vectors, crc = row
        if not isinstance(content, bytes) or not isinstance(vectors, bytes):  # rotted into another type
            raise self._damaged()
        if _crc(doc_id, content, str(facts), vectors) != crc:
            raise self._damaged()
        text = str(content, "utf-8", "surrogatepass")
        pages, spans = json.loads(facts)
        chunks = [Chunk(one[0], doc_id, index, text[one[1] : one[2]], *one[1:]) for index, one in enumerate(spans)]
        matrix = np.frombuffer(vectors, dtype="<f4").astype(np.float32).reshape(len(chunks), self._built_with[1])
        return IndexedDocument(Document(doc_id, "", text, pages_from_json(pages)), chunks, matrix)

    def _damaged(self) -> StoreCorruptError:
        """Drop what waits, and return the error that says so."""
        self.drop()
        return StoreCorruptError(
            f"what waits in {self.path} to be published is damaged and was dropped: run the same ingest again"
        )


def _make_safe(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA synchronous = FULL")


def _remove(path: Path) -> None:
    # The logs first: a new file of that name must not be found beside the log of the old one.
    for name in (f"{path.name}-wal", f"{path.name}-shm", f"{path.name}-journal", path.name):
        path.with_name(name).unlink(missing_ok=True)


def _put_source(connection: sqlite3.Connection, update: SourceUpdate) -> int:
    connection.execute(
        "INSERT INTO sources (uri, content_sha256, recipe) VALUES (?,?,?) ON CONFLICT (uri) DO UPDATE SET "
        "content_sha256 = excluded.content_sha256, recipe = excluded.recipe",
        (to_sql(update.uri), update.content_sha256, update.recipe),
    )
    row = connection.execute("SELECT source_id FROM sources WHERE uri = ?", (to_sql(update.uri),)).fetchone()
    return int(row[0])


def _put_documents(connection: sqlite3.Connection, source_id: int, update: SourceUpdate) -> None:
    for item in update.documents:
        if not isinstance(item, IndexedDocument):
            continue
        document = item.document
        spans = [
            (one.chunk_id, one.char_start, one.char_stop, one.token_count, one.page, dict(one.metadata))
            for one in item.chunks
        ]
        text = document.text.encode("utf-8", "surrogatepass")
        facts = json.dumps([pages_to_json(document.pages), spans])
        vectors = item.vectors.astype("<f4").tobytes()
        crc = _crc(document.doc_id, text, facts, vectors)
        connection.execute(
            f"INSERT INTO documents (source_id, recipe, {_DOCUMENT_COLUMNS}) VALUES (?,?,?,?,?,?,?) "  # noqa: S608
            "ON CONFLICT (doc_id) DO UPDATE SET recipe = excluded.recipe, text = excluded.text, "
            "facts = excluded.facts, vectors = excluded.vectors, crc = excluded.crc",
            (source_id, update.recipe, document.doc_id, text, facts, vectors, crc),
        )


def _put_links(connection: sqlite3.Connection, source_id: int, update: SourceUpdate) -> None:
    sql = "SELECT ifnull(max(position), -1) + 1 FROM links WHERE source_id = ?"
    (position,) = connection.execute(sql, (source_id,)).fetchone()
    rows = []
    for place, item in enumerate(update.documents, position):
        one = item.document if isinstance(item, IndexedDocument) else item
        metadata = metadata_to_json(one.uri, one.metadata)
        rows.append((source_id, place, one.doc_id, to_sql(one.uri), metadata))
    connection.executemany("INSERT INTO links (source_id, position, doc_id, uri, metadata) VALUES (?,?,?,?,?)", rows)


def _crc(doc_id: str, text: bytes, facts: str, vectors: bytes) -> int:
    return zlib.crc32(vectors, zlib.crc32(text, zlib.crc32((doc_id + facts).encode())))
