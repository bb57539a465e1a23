"""Row changes of one transaction: sources, documents, links, chunks, full-text rows, and which vectors died."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ragkit.store.kv_heirs import KVHeirs
from ragkit.store.records import IndexedDocument, SourceStatus, SourceUpdate
from ragkit.store.rows import (
    SEGMENT_COLUMNS,
    SegmentRow,
    chunk_crc,
    filter_rows,
    from_sql,
    metadata_to_json,
    pages_to_json,
    row_crc,
    to_sql,
)
from ragkit.store.segments import KV_SEGMENT, VECTOR_SEGMENT, live_mask, segment_row_ids, with_live
from ragkit.store.sources import CHUNK_COLUMNS, DOCUMENT_COLUMNS, LINK_COLUMNS, SOURCE_COLUMNS
from ragkit.store.vectors import read_segments
from ragkit.types import Chunk, Metadata

_SOURCE_NUMBERS = frozenset({"source_id", "size", "mtime_ns", "attempts"})


@dataclass(frozen=True, slots=True)
class DocumentRows:
    """A document that has to be stored, and the first of its row ids."""

    indexed: IndexedDocument
    recipe: str
    first_row: int


class Changes:
    """Applies changes within the open transaction of `connection`; `finish` must be called before the commit.

    Attributes:
        hands_on_kv: False where nothing that is stored has a predecessor of the same text; then none is looked for.
        heirs: after `finish`, chunks that have the text of deleted ones, by the id of the deleted one.
    """

    def __init__(self, connection: sqlite3.Connection, generation: int) -> None:
        self.connection = connection
        self.generation = generation
        self._dead_rows: list[int] = []
        self._loose_documents: set[int] = set()
        self._full_text_lost = False
        self._kv = KVHeirs(connection)
        self.hands_on_kv = True
        self.heirs: dict[str, str] = {}

    def put_source(self, update: SourceUpdate) -> int:
        """Record the outcome of looking at a source and return its key; its links are left as they are."""
        row = self.connection.execute(
            "SELECT source_id, content_sha256, attempts, indexed_sha256 FROM sources WHERE uri = ?",
            (to_sql(update.uri),),
        ).fetchone()
        source_id, content, attempts, indexed = row or (self._next("sources", "source_id"), "", 0, "")
        failure = update.failure
        outcome: tuple[object, ...]
        if failure is None:
            outcome = (SourceStatus.OK.value, "", "", "", 0, update.content_sha256)
        else:
            attempts = attempts + 1 if content == update.content_sha256 else 1
            message = to_sql(failure.message)
            outcome = (SourceStatus.FAILED.value, failure.code, failure.stage, message, attempts, indexed)
        content_of = (update.content_sha256, update.size, update.mtime_ns, update.media_type, update.reader)
        self._write("sources", SOURCE_COLUMNS, (source_id, to_sql(update.uri), *content_of, update.recipe, *outcome))
        return int(source_id)

    def move_source(self, uri: str, *, size: int, mtime_ns: int, moved_to: str | None = None) -> None:
        """Change where a known source lies, and its size and time."""
        row = self._read("sources", SOURCE_COLUMNS, "uri", to_sql(uri))
        assert row is not None, uri
        new_uri = to_sql(uri if moved_to is None else moved_to)
        self._write("sources", SOURCE_COLUMNS, (row[0], new_uri, row[2], size, mtime_ns, *row[5:-1]))

    def mark_source(self, source_id: int) -> None:
        """Give a source the status `damaged` and forget its content's digest, so that it is read again."""
        row = self._read("sources", SOURCE_COLUMNS, "source_id", source_id)
        if row is None:
            return
        values = dict(zip(SOURCE_COLUMNS.split(", ")[:-1], row[:-1], strict=True))
        for name, value in values.items():  # a rotted value may have turned into any type
            if not isinstance(value, int if name in _SOURCE_NUMBERS else (str, bytes)):
                values[name] = 0 if name in _SOURCE_NUMBERS else ""
        values.update(source_id=source_id, content_sha256="", status=SourceStatus.DAMAGED.value)
        self._write("sources", SOURCE_COLUMNS, tuple(values.values()))

    def drop_source(self, source_id: int) -> None:
        """Forget a source and its links."""
        self.drop_links(source_id)
        self.connection.execute("DELETE FROM sources WHERE source_id = ?", (source_id,))

    def drop_links(self, source_id: int) -> None:
        """Unlink every document of a source; `finish` deletes those that nothing links to any more."""
        rows = self.connection.execute("SELECT doc_key FROM links WHERE source_id = ?", (source_id,))
        self._loose_documents.update(doc_key for (doc_key,) in rows)
        self.connection.execute("DELETE FROM links WHERE source_id = ?", (source_id,))

    def drop_link(self, link_id: int) -> None:
        """Unlink one document."""
        rows = self.connection.execute("SELECT doc_key FROM links WHERE link_id = ?", (link_id,))
        self._loose_documents.update(doc_key for (doc_key,) in rows)
        self.connection.execute("DELETE FROM links WHERE link_id = ?", (link_id,))

    def link(self, source_id: int, documents: Sequence[tuple[int, str, Metadata]]) -> None:
        """Link a source to documents, behind those that it has: (document key, URI, metadata) in order."""
        first_link = self._next("links", "link_id")
        sql = "SELECT ifnull(max(position), -1) + 1 FROM links WHERE source_id = ?"
        (first_position,) = self.connection.execute(sql, (source_id,)).fetchone()
        links, values = [], []
        for index, (doc_key, uri, metadata) in enumerate(documents):
            link_id, position = first_link + index, first_position + index
            row = (link_id, source_id, position, doc_key, to_sql(uri), metadata_to_json(uri, metadata))
            links.append((*row, row_crc(*row)))
            values += filter_rows(link_id, metadata)
        self.connection.executemany(f"INSERT INTO links ({LINK_COLUMNS}, crc) VALUES (?,?,?,?,?,?,?)", links)  # noqa: S608
        self.connection.executemany("INSERT INTO link_values (link_id, key, value) VALUES (?,?,?)", values)

    def rename_links(self, old_uri: str, new_uri: str) -> None:
        """Change the URIs of a source's documents: `old_uri` itself and `old_uri#...` follow the source."""
        sql = f"SELECT {LINK_COLUMNS} FROM links WHERE source_id = (SELECT source_id FROM sources WHERE uri = ?)"  # noqa: S608
        for row in self.connection.execute(sql, (to_sql(old_uri),)).fetchall():
            uri = from_sql(row[4])
            if uri == old_uri or uri.startswith(old_uri + "#"):
                moved = (*row[:4], to_sql(new_uri + uri[len(old_uri) :]), row[5])
                self._upsert("links", LINK_COLUMNS, moved)

    def put_document(self, rows: DocumentRows) -> int:
        """Store a document with its chunks, in place of what was stored under its id, and return its key."""
        document, chunks = rows.indexed.document, rows.indexed.chunks
        found = self.connection.execute("SELECT doc_key FROM documents WHERE doc_id = ?", (document.doc_id,)).fetchone()
        doc_key: int = found[0] if found else self._next("documents", "doc_key")
        if found:
            self._delete_chunks(doc_key)
        size = (len(document.text), len(chunks), sum(chunk.token_count for chunk in chunks))
        values = (doc_key, document.doc_id, rows.recipe, *size, pages_to_json(document.pages), 0)
        self._write("documents", DOCUMENT_COLUMNS, values)
        self._insert_chunks(doc_key, rows.first_row, chunks)
        return doc_key

    def rewrite_document(self, doc_key: int, *, recipe: str | None = None, damaged: bool | None = None) -> None:
        """Change the recipe or the damage mark of a document."""
        row = self._read("documents", DOCUMENT_COLUMNS, "doc_key", doc_key)
        if row is None:
            return
        values = list(row)
        values[2] = values[2] if recipe is None else recipe
        values[7] = values[7] if damaged is None else int(damaged)
        self._write("documents", DOCUMENT_COLUMNS, tuple(values[:-1]))

    def delete_document(self, doc_key: int) -> None:
        """Delete a document with its chunks and full-text rows; vectors count as dead, and KV waits for `finish`."""
        self.connection.execute("DELETE FROM links WHERE doc_key = ?", (doc_key,))
        self._delete_chunks(doc_key)
        self.connection.execute("DELETE FROM documents WHERE doc_key = ?", (doc_key,))

    def put_segment(self, segment: SegmentRow) -> int:
        """Record a segment file (new where its `segment_id` is 0) and return its key."""
        if segment.segment_id == 0:
            sql = "SELECT segment_id FROM segments WHERE sha256 = ?"
            known = self.connection.execute(sql, (segment.sha256,)).fetchone()
            segment = segment._replace(segment_id=known[0] if known else self._next("segments", "segment_id"))
        self._upsert("segments", SEGMENT_COLUMNS, tuple(segment))
        return segment.segment_id

    def drop_segment(self, segment_id: int) -> None:
        """Forget a segment file; `gc` removes the file itself."""
        self.connection.execute("DELETE FROM segments WHERE segment_id = ?", (segment_id,))

    def rebuild_full_text(self) -> None:
        """Make the full-text index anew from the chunks when the transaction finishes."""
        self._full_text_lost = True

    def finish(self) -> None:
        """Delete documents that nothing links to, hand on their KV, mark dead vectors, and mend the full-text index."""
        for doc_key in sorted(self._loose_documents):
            linked = self.connection.execute("SELECT 1 FROM links WHERE doc_key = ? LIMIT 1", (doc_key,)).fetchone()
            if linked is None:
                self.delete_document(doc_key)
        self.heirs = self._kv.settle()
        self._bury(self._dead_rows)
        if self._full_text_lost:
            self.connection.execute("INSERT INTO chunk_fts (chunk_fts) VALUES ('rebuild')")

    def _insert_chunks(self, doc_key: int, first_row: int, chunks: Iterable[Chunk]) -> None:
        rows, texts = [], []
        for row_id, chunk in enumerate(chunks, first_row):
            place = (chunk.char_start, chunk.char_stop, chunk.token_count, chunk.page)
            metadata = metadata_to_json(f"chunk {chunk.index}", chunk.metadata) if chunk.metadata else ""
            facts = (chunk.chunk_id, doc_key, chunk.index, *place, metadata)
            encoded = chunk.text.encode("utf-8", "surrogatepass")
            crc = chunk_crc(row_id, facts, encoded)
            if self.hands_on_kv:
                self._kv.came(chunk.chunk_id, encoded, chunk.char_stop - chunk.char_start)
            text = to_sql(chunk.text)
            rows.append((row_id, *facts, text, crc))
            texts.append((row_id, text))
        sql = f"INSERT INTO chunks ({CHUNK_COLUMNS}, text, crc) VALUES (?,?,?,?,?,?,?,?,?,?,?)"  # noqa: S608
        self.connection.executemany(sql, rows)
        self.connection.executemany("INSERT INTO chunk_fts (rowid, text) VALUES (?,?)", texts)

    def _delete_chunks(self, doc_key: int) -> None:
        sql = f"SELECT {CHUNK_COLUMNS}, CAST(text AS BLOB), crc FROM chunks WHERE doc_key = ?"  # noqa: S608
        texts: list[tuple[int, bytes]] = []
        for row in self.connection.execute(sql, (doc_key,)):
            texts.append((row[0], row[9]))
            if chunk_crc(row[0], tuple(row[1:9]), row[9]) == row[10]:
                self._kv.went(row[1], row[9], row[5] - row[4])
            else:
                self._kv.went(row[1], b"", 0)  # nobody inherits from what rotted
                self._full_text_lost = True  # deleting other words than were indexed would leave the index wrong
        delete = "INSERT INTO chunk_fts (chunk_fts, rowid, text) VALUES ('delete', ?, ?)"
        if not self._full_text_lost:
            self.connection.executemany(delete, texts)
        self.connection.execute("DELETE FROM chunks WHERE doc_key = ?", (doc_key,))
        self._dead_rows += [row_id for row_id, _ in texts]

    def _bury(self, dead_rows: list[int]) -> None:
        """Clear the live bits of rows; a segment without live rows is forgotten."""
        if not dead_rows:
            return
        import numpy as np

        dead = np.sort(np.array(dead_rows, dtype=np.int64))
        for segment in read_segments(self.connection, VECTOR_SEGMENT):
            low, high = np.searchsorted(dead, [segment.first_row, segment.last_row + 1])
            if low == high:
                continue
            mask = live_mask(segment)
            mask[np.isin(segment_row_ids(segment), dead[low:high], assume_unique=True)] = False
            if mask.any():
                self.put_segment(with_live(segment, mask))
            else:
                self.drop_segment(segment.segment_id)
        self.connection.execute(
            "DELETE FROM segments WHERE kind = ? AND segment_id NOT IN (SELECT segment_id FROM kv)", (KV_SEGMENT,)
        )

    def _next(self, table: str, key: str) -> int:
        row = self.connection.execute(f"SELECT ifnull(max({key}), 0) + 1 FROM {table}").fetchone()  # noqa: S608
        return int(row[0])

    def _read(self, table: str, columns: str, key: str, value: object) -> tuple[Any, ...] | None:
        sql = f"SELECT {columns} FROM {table} WHERE {key} = ?"  # noqa: S608 - our own names
        row: tuple[Any, ...] | None = self.connection.execute(sql, (value,)).fetchone()
        return row

    def _write(self, table: str, columns: str, values: tuple[object, ...]) -> None:
        """Insert or update a row whose last column is the generation."""
        self._upsert(table, columns, (*values, self.generation))

    def _upsert(self, table: str, columns: str, row: tuple[object, ...]) -> None:
        """Insert or update a row by its first column; unlike a replacement this keeps the rows that refer to it."""
        names = columns.split(", ")
        assert len(names) == len(row), (names, row)
        changes = ", ".join(f"{name} = excluded.{name}" for name in [*names[1:], "crc"])
        marks = ",".join("?" * (len(row) + 1))
        self.connection.execute(
            f"INSERT INTO {table} ({columns}, crc) VALUES ({marks}) ON CONFLICT ({names[0]}) DO UPDATE SET {changes}",  # noqa: S608
            (*row, row_crc(*row)),
        )
