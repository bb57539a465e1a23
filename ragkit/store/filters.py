"""Metadata filters: which rows belong to documents that fulfil every condition."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ragkit.store.rows import filter_text, to_sql
from ragkit.types import MetadataValue

if TYPE_CHECKING:
    from ragkit.store.records import RowIds

_GLOB = frozenset("*?[")


def filter_row_ids(connection: sqlite3.Connection, filters: Mapping[str, MetadataValue]) -> RowIds:
    """Return the sorted row ids of chunks of documents that fulfil all of `filters`; all rows for none."""
    import numpy as np

    documents: set[int] | None = None
    for key, value in filters.items():
        found = _documents(connection, key, value)
        documents = found if documents is None else documents & found
    if documents is None:
        documents = {key for (key,) in connection.execute("SELECT doc_key FROM documents")}
    rows = connection.execute(
        "SELECT row_id FROM chunks WHERE doc_key IN (SELECT value FROM json_each(?))", (json.dumps(sorted(documents)),)
    )
    return np.sort(np.fromiter((row_id for (row_id,) in rows), dtype=np.int64))


def _documents(connection: sqlite3.Connection, key: str, value: MetadataValue) -> set[int]:
    text = "" if value is None else str(value)
    if key == "doc_id":
        rows = connection.execute("SELECT doc_key FROM documents WHERE doc_id = ?", (text,))
    elif key == "uri":
        return _documents_by_uri(connection, text)
    else:
        rows = connection.execute(
            "SELECT doc_key FROM link_values JOIN links USING (link_id) WHERE key = ? AND value = ?",
            (to_sql(key), to_sql(filter_text(value))),
        )
    return {doc_key for (doc_key,) in rows}


def _documents_by_uri(connection: sqlite3.Connection, uri: str) -> set[int]:
    conditions = ["l.uri = ?1", "l.source_id = (SELECT source_id FROM sources WHERE uri = ?1)"]
    if not _GLOB.isdisjoint(uri):
        conditions += ["l.uri GLOB ?1", "s.uri GLOB ?1"]
    found: set[int] = set()
    for condition in conditions:  # one statement each, so that the exact ones use their indexes
        sql = f"SELECT l.doc_key FROM links l JOIN sources s USING (source_id) WHERE {condition}"  # noqa: S608
        found.update(doc_key for (doc_key,) in connection.execute(sql, (to_sql(uri),)))
    return found
