"""Reads of chunks by row id, by chunk id and by place."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ragkit.errors import StoreError
from ragkit.store.records import StoredChunk
from ragkit.store.rows import checked, from_sql, row_crc
from ragkit.store.sources import check_document, checked_chunk_text
from ragkit.types import Chunk

if TYPE_CHECKING:
    from ragkit.store.records import RowIds

_BATCH = 5_000  # bound parameters of one statement
_SELECT = """
SELECT c.row_id, c.chunk_id, c.doc_key, c.idx, c.char_start, c.char_stop, c.token_count, c.page, c.metadata,
       CAST(c.text AS BLOB), c.crc,
       d.doc_key, d.doc_id, d.recipe, d.characters, d.chunks, d.tokens, d.pages, d.damaged, d.generation, d.crc,
       l.link_id, l.source_id, l.position, l.doc_key, l.uri, l.metadata, l.crc
FROM chunks c JOIN documents d ON d.doc_key = c.doc_key
JOIN links l ON l.link_id = (SELECT min(link_id) FROM links WHERE doc_key = c.doc_key)
"""


def read_chunks(
    connection: sqlite3.Connection, column: str, keys: Sequence[object], generation: int
) -> list[StoredChunk]:
    """Return the chunks whose `column` (row_id or chunk_id) has these values, in the given order."""
    found: dict[object, StoredChunk] = {}
    position = 0 if column == "row_id" else 1
    for start in range(0, len(keys), _BATCH):
        batch = keys[start : start + _BATCH]
        marks = ",".join("?" * len(batch))
        for row in connection.execute(f"{_SELECT} WHERE c.{column} IN ({marks})", batch):
            found[row[position]] = _stored_chunk(row)
    missing = [key for key in keys if key not in found]
    if missing:
        raise StoreError(
            f"chunk {missing[0]} is not in generation {generation} of the store: "
            "search and read within one snapshot, and use an index of the same generation"
        )
    return [found[key] for key in keys]


def read_known_chunks(connection: sqlite3.Connection, chunk_ids: Sequence[str]) -> set[str]:
    """Return which of these chunks are there."""
    known: set[str] = set()
    for start in range(0, len(chunk_ids), _BATCH):
        batch = chunk_ids[start : start + _BATCH]
        marks = ",".join("?" * len(batch))
        rows = connection.execute(f"SELECT chunk_id FROM chunks WHERE chunk_id IN ({marks})", batch)  # noqa: S608
        known.update(chunk_id for (chunk_id,) in rows)
    return known


def read_chunk_at(connection: sqlite3.Connection, doc_id: str, index: int) -> StoredChunk | None:
    """Return chunk `index` of a document, or None."""
    row = connection.execute(f"{_SELECT} WHERE d.doc_id = ? AND c.idx = ?", (doc_id, index)).fetchone()
    return None if row is None else _stored_chunk(row)


def read_row_ids(connection: sqlite3.Connection) -> RowIds:
    """Return all row ids, ascending."""
    import numpy as np

    # Read from the narrow (doc_key, idx) index, since the table itself holds all the text; and as one string, which
    # numpy parses several times faster than Python fetches rows.
    sql = "SELECT group_concat(row_id, ' ') FROM chunks INDEXED BY sqlite_autoindex_chunks_2"
    (listed,) = connection.execute(sql).fetchone()
    return np.sort(np.fromstring(listed or "", dtype=np.int64, sep=" "))


def _stored_chunk(row: Sequence[Any]) -> StoredChunk:
    text = checked_chunk_text(row[:11])
    check_document(row[11:21])
    checked("link", row[21], row[27], row_crc(*row[21:27]))
    metadata = json.loads(row[8]) if row[8] else {}
    chunk = Chunk(row[1], row[12], row[3], text, row[4], row[5], row[6], row[7], metadata)
    return StoredChunk(row[0], chunk, from_sql(row[25]), json.loads(row[26]))
