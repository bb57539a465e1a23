"""Publishing a large source: all that its parts have brought becomes visible in one transaction.

Vectors are written first, then text, links and the source's record change together: until the commit readers see the
source as it was before, and a job that is killed here publishes anew. Memory holds one batch of documents.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.errors import StoreError
from ragkit.store.changes import Changes, DocumentRows
from ragkit.store.connections import translated
from ragkit.store.records import IndexedDocument, SourceUpdate
from ragkit.store.rows import SegmentRow, to_sql
from ragkit.store.schema import set_meta
from ragkit.store.segments import write_vector_segment
from ragkit.store.snapshots import read_meta
from ragkit.store.staging import Staging
from ragkit.store.transactions import Transactions
from ragkit.types import Metadata

if TYPE_CHECKING:
    from ragkit.store.records import Vectors

SEGMENT_BYTES = 32 << 20  # of vectors, which are in memory until they are written
_LINKS_AT_ONCE = 4096

IsStored = Callable[[IndexedDocument], bool]


def publish(
    folder: Path,
    connection: sqlite3.Connection,
    transactions: Transactions,
    staging: Staging,
    update: SourceUpdate,
    is_stored: IsStored,
) -> tuple[int, int, Mapping[str, str]]:
    """Make a source be what waits for it and return the generation, the number of new chunks, and their heirs.

    Args:
        folder, connection, transactions: the store's.
        staging: holds every part of it, the last one included.
        update: the source's record; its documents are those that wait.
        is_stored: says which documents need not be stored again.

    Raises:
        StoreSpaceError: the disk is full; what waits is kept.
    """
    needed = staging.bytes_on_disk
    with translated(folder, needed):
        first_row = int(read_meta(connection, "last_row_id")) + 1
        segments = list(_written(folder, _missing(staging, update, is_stored), first_row))
    rows = sum(segment.rows for segment in segments)
    sql = "SELECT 1 FROM links JOIN sources USING (source_id) WHERE sources.uri = ?"
    with transactions.open(needed) as changes:
        changes.hands_on_kv = connection.execute(sql, (to_sql(update.uri),)).fetchone() is not None
        for segment in segments:
            changes.put_segment(segment)
        if rows:
            set_meta(connection, "last_row_id", str(first_row + rows - 1))
        next_row = first_row
        for indexed in _missing(staging, update, is_stored):
            changes.put_document(DocumentRows(indexed, update.recipe, next_row))
            next_row += len(indexed.chunks)
        source_id = changes.put_source(replace(update, documents=()))
        changes.drop_links(source_id)
        links = _keyed(connection, changes, staging.links(update.uri), update)
        while batch := list(islice(links, _LINKS_AT_ONCE)):
            changes.link(source_id, batch)
        generation = changes.generation
    return generation, rows, changes.heirs


def forget_published(connection: sqlite3.Connection, staging: Staging) -> None:
    """Drop what waits and is published: a job was killed between the two."""
    for uri, content, recipe in staging.sources():
        sql = "SELECT 1 FROM sources WHERE uri = ? AND indexed_sha256 = ? AND recipe = ?"
        if content and connection.execute(sql, (to_sql(uri), content, recipe)).fetchone() is not None:
            staging.forget(uri)


def _missing(staging: Staging, update: SourceUpdate, is_stored: IsStored) -> Iterator[IndexedDocument]:
    return (indexed for indexed in staging.documents(update.uri) if not is_stored(indexed))


def _written(folder: Path, documents: Iterable[IndexedDocument], next_row: int) -> Iterator[SegmentRow]:
    """Write the vectors of documents as segments and yield their rows."""
    import numpy as np

    held: list[Vectors] = []
    nbytes = 0

    def segment() -> SegmentRow:
        vectors = np.concatenate(held)
        return write_vector_segment(folder, np.arange(next_row, next_row + len(vectors), dtype=np.int64), vectors)

    for document in documents:
        if not document.chunks:
            continue
        held.append(document.vectors)  # and nothing else of it: a segment's vectors are of many documents
        nbytes += document.vectors.nbytes
        if nbytes >= SEGMENT_BYTES:
            row = segment()
            yield row
            held, nbytes, next_row = [], 0, next_row + row.rows
    if held:
        yield segment()


def _keyed(
    connection: sqlite3.Connection, changes: Changes, links: Iterable[tuple[str, str, Metadata]], update: SourceUpdate
) -> Iterator[tuple[int, str, Metadata]]:
    """Yield links by the keys of their documents, which count as cut by this update's recipe from now on."""
    sql = "SELECT doc_key, recipe FROM documents WHERE doc_id = ? AND NOT damaged"
    for doc_id, uri, metadata in links:
        row = connection.execute(sql, (doc_id,)).fetchone()
        if row is None:
            raise StoreError(f"{uri} was removed from the store while {update.uri} was read: run the same ingest again")
        if row[1] != update.recipe:
            changes.rewrite_document(row[0], recipe=update.recipe)
        yield row[0], uri, metadata
