"""Reads of sources, documents and the links between them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from ragkit.errors import StoreCorruptError, StoreError
from ragkit.store.records import DocumentLink, SourceFailure, SourceRecord, SourceStatus
from ragkit.store.rows import checked, chunk_crc, from_sql, pages_from_json, row_crc, to_sql
from ragkit.types import Document, PageSpan, document_id

SOURCE_COLUMNS = (
    "source_id, uri, content_sha256, size, mtime_ns, media_type, reader, recipe, status, error_code, error_stage, "
    "error_message, attempts, indexed_sha256, generation"
)
DOCUMENT_COLUMNS = "doc_key, doc_id, recipe, characters, chunks, tokens, pages, damaged, generation"
LINK_COLUMNS = "link_id, source_id, position, doc_key, uri, metadata"
CHUNK_COLUMNS = "row_id, chunk_id, doc_key, idx, char_start, char_stop, token_count, page, metadata"


def read_sources(connection: sqlite3.Connection, where: str = "1", values: Sequence[object] = ()) -> list[SourceRecord]:
    """Return the sources that fulfil a condition, in order of URI, with what they link to."""
    tally = (
        "LEFT JOIN (SELECT l.source_id AS owner, count(*) AS n, sum(d.chunks) AS c FROM links l "
        "JOIN documents d USING (doc_key) GROUP BY l.source_id) ON owner = source_id"
    )
    if where != "1":  # for few sources, counting per source is cheaper than grouping all
        tally = ""
    columns = SOURCE_COLUMNS + ", crc" + (", ifnull(n, 0), ifnull(c, 0)" if tally else "")
    sql = f"SELECT {columns} FROM sources {tally} WHERE {where} ORDER BY uri"  # noqa: S608 - no user text in it
    records = []
    for row in connection.execute(sql, values).fetchall():
        counts = row[16:] if tally else _linked(connection, row[0])
        records.append(_source(row[:16], counts))
    return records


def read_links(connection: sqlite3.Connection, where: str, value: object) -> list[DocumentLink]:
    """Return links by one column, in the order in which they were made."""
    sql = (
        "SELECT l.link_id, l.source_id, l.position, l.doc_key, l.uri, l.metadata, l.crc, s.uri, d.doc_id "  # noqa: S608
        "FROM links l JOIN sources s USING (source_id) JOIN documents d USING (doc_key) "
        f"WHERE {where} = ? ORDER BY l.link_id"
    )
    links = []
    for row in connection.execute(sql, (value,)):
        _check_link(row[:7])
        links.append(DocumentLink(from_sql(row[7]), row[8], from_sql(row[4]), json.loads(row[5])))
    return links


def read_pages(connection: sqlite3.Connection, doc_id: str) -> tuple[PageSpan, ...]:
    """Return the page spans of a document without reading its text."""
    return pages_from_json(_document_row(connection, doc_id)[6])


def _document_row(connection: sqlite3.Connection, doc_id: str) -> Any:
    row = connection.execute(f"SELECT {DOCUMENT_COLUMNS}, crc FROM documents WHERE doc_id = ?", (doc_id,)).fetchone()  # noqa: S608
    if row is None:
        raise StoreError(f"there is no document {doc_id!r} in the store: `ragkit ls` lists the documents")
    check_document(row)
    return row


def read_document(connection: sqlite3.Connection, doc_id: str) -> Document:
    """Return a document, joined from its chunks and checked against its id."""
    row = _document_row(connection, doc_id)
    text = joined_text(connection, row[0])
    pages = pages_from_json(row[6])
    if document_id(text, pages) != doc_id:
        raise StoreCorruptError(
            f"document {doc_id} is damaged: its text does not match its id; run `ragkit verify --repair` "
            "and ingest its source again"
        )
    links = read_links(connection, "l.doc_key", row[0])
    if not links:
        raise StoreCorruptError(f"document {doc_id} is damaged: nothing links to it; run `ragkit verify`")
    return Document(doc_id, links[0].uri, text, pages, links[0].metadata)


def read_recipe(connection: sqlite3.Connection, doc_id: str) -> str | None:
    """Return the recipe of a stored document; None where it is absent or damaged."""
    sql = f"SELECT {DOCUMENT_COLUMNS}, crc FROM documents WHERE doc_id = ?"  # noqa: S608 - constants
    row = connection.execute(sql, (doc_id,)).fetchone()
    if row is None or row[7]:
        return None
    check_document(row)
    return str(row[2])


def joined_text(connection: sqlite3.Connection, doc_key: int) -> str:
    """Return a document's text from its chunks, which tile it and may overlap.

    Raises:
        StoreCorruptError: a chunk's bytes rotted, or the chunks leave a gap.
    """
    sql = f"SELECT {CHUNK_COLUMNS}, CAST(text AS BLOB), crc FROM chunks WHERE doc_key = ? ORDER BY idx"  # noqa: S608
    pieces: list[str] = []
    covered = 0
    for row in connection.execute(sql, (doc_key,)):
        text = checked_chunk_text(row)
        if not row[4] <= covered < row[5] or len(text) != row[5] - row[4]:
            raise StoreCorruptError(f"chunk {row[3]} of document row {doc_key} does not go on where the last one ended")
        pieces.append(text[covered - row[4] :])
        covered = row[5]
    return "".join(pieces)


def checked_chunk_text(row: Sequence[Any]) -> str:
    """Return the text of a chunk row (`CHUNK_COLUMNS`, text as bytes, crc) after checking its checksum."""
    facts, text, crc = tuple(row[1:9]), row[9], row[10]
    checked("chunk", row[0], crc, chunk_crc(row[0], facts, text))
    return str(text, "utf-8", "surrogatepass")


def check_document(row: Sequence[Any]) -> None:
    """Check a row of `documents` (`DOCUMENT_COLUMNS`, crc)."""
    checked("document", row[1], row[9], row_crc(*row[:9]))


def stored_uri(uri: str) -> str | bytes:
    """Return a URI as the catalogue holds it."""
    return to_sql(uri)


def check_source(row: Sequence[Any]) -> None:
    """Check a row of `sources` (`SOURCE_COLUMNS`, crc)."""
    checked("source", row[1], row[15], row_crc(*row[:15]))


def _check_link(row: Sequence[Any]) -> None:
    checked("link", row[0], row[6], row_crc(*row[:6]))


def _linked(connection: sqlite3.Connection, source_id: int) -> tuple[int, int]:
    row = connection.execute(
        "SELECT count(*), ifnull(sum(d.chunks), 0) FROM links l JOIN documents d USING (doc_key) WHERE l.source_id = ?",
        (source_id,),
    ).fetchone()
    return int(row[0]), int(row[1])


def _source(row: Sequence[Any], counts: Sequence[int]) -> SourceRecord:
    check_source(row)
    status = SourceStatus(row[8])
    failure = SourceFailure(row[9], row[10], from_sql(row[11])) if row[9] else None
    return SourceRecord(
        uri=from_sql(row[1]),
        content_sha256=row[2],
        size=row[3],
        mtime_ns=row[4],
        media_type=row[5],
        reader=row[6],
        recipe=row[7],
        status=status,
        failure=failure,
        attempts=row[12],
        indexed_sha256=row[13],
        generation=row[14],
        documents=counts[0],
        chunks=counts[1],
    )
