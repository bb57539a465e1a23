"""Embedding a whole store anew, document by document: new segments first, then one transaction that changes over."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.errors import StoreCorruptError, UsageError
from ragkit.store.connections import translated
from ragkit.store.records import DocumentSpans
from ragkit.store.rows import SegmentRow
from ragkit.store.schema import set_meta
from ragkit.store.segments import VECTOR_SEGMENT, write_vector_segment
from ragkit.store.sources import CHUNK_COLUMNS, checked_chunk_text
from ragkit.store.transactions import Transactions
from ragkit.store.vectors import read_segments

if TYPE_CHECKING:
    from ragkit.store.records import RowIds, Vectors

SEGMENT_BYTES = 64 << 20


def replace_vectors(
    folder: Path,
    connection: sqlite3.Connection,
    transactions: Transactions,
    embedder_id: str,
    dim: int,
    embed: Callable[[Sequence[DocumentSpans]], Vectors],
    batch_rows: int,
) -> int:
    """Embed every chunk and change over to the new vectors in one transaction; return the rows.

    The old vectors stay visible until then. Memory holds one segment and one batch of whole documents at most.
    """
    segments: list[SegmentRow] = []
    held: list[tuple[RowIds, Vectors]] = []
    rows = held_bytes = 0

    for row_ids, documents in _batches(_documents(folder, connection, batch_rows), batch_rows):
        vectors = embed(documents)
        _check(vectors, len(row_ids), dim)
        held.append((row_ids, vectors))
        rows += len(row_ids)
        held_bytes += vectors.nbytes
        if held_bytes >= SEGMENT_BYTES:
            segments.append(_write(folder, held))
            held, held_bytes = [], 0
    if held:
        segments.append(_write(folder, held))

    with transactions.open() as changes:
        for old in read_segments(changes.connection, VECTOR_SEGMENT):
            changes.drop_segment(old.segment_id)
        for segment in segments:
            changes.put_segment(segment)
        for (doc_key,) in changes.connection.execute("SELECT doc_key FROM documents WHERE damaged").fetchall():
            changes.rewrite_document(doc_key, damaged=False)
        changes.connection.execute("DELETE FROM vector_index")
        set_meta(changes.connection, "embedder_id", embedder_id)
        set_meta(changes.connection, "dim", str(dim))
    return rows


def _batches(
    documents: Iterator[tuple[list[int], DocumentSpans]], batch_rows: int
) -> Iterator[tuple[RowIds, list[DocumentSpans]]]:
    """Yield documents in batches of `batch_rows` chunks or a few more, with the row ids of their chunks."""
    import numpy as np

    rows: list[int] = []
    held: list[DocumentSpans] = []
    for row_ids, document in documents:
        rows += row_ids
        held.append(document)
        if len(rows) >= batch_rows:
            yield np.array(rows, dtype=np.int64), held
            rows, held = [], []
    if held:
        yield np.array(rows, dtype=np.int64), held


def _documents(
    folder: Path, connection: sqlite3.Connection, batch_rows: int
) -> Iterator[tuple[list[int], DocumentSpans]]:
    """Yield every document with the row ids of its chunks, which ascend over all documents."""
    row_ids: list[int] = []
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    current: int | None = None
    for row in _chunk_rows(folder, connection, batch_rows):
        row_id, _, doc_key, index, start, stop = row[:6]
        if doc_key != current and row_ids:
            yield row_ids, DocumentSpans("".join(pieces), spans)
            row_ids, pieces, spans = [], [], []
        current = doc_key
        text, covered = checked_chunk_text(row), spans[-1][1] if spans else 0
        if not start <= covered < stop or len(text) != stop - start:
            raise StoreCorruptError(
                f"chunk {index} of document row {doc_key} does not go on where the last one ended; run `ragkit verify`"
            )
        row_ids.append(row_id)
        pieces.append(text[covered - start :])
        spans.append((start, stop))
    if row_ids:
        yield row_ids, DocumentSpans("".join(pieces), spans)


def _chunk_rows(folder: Path, connection: sqlite3.Connection, batch_rows: int) -> Iterator[Any]:
    sql = f"SELECT {CHUNK_COLUMNS}, CAST(text AS BLOB), crc FROM chunks WHERE row_id > ? ORDER BY row_id LIMIT ?"  # noqa: S608
    last = -1
    while True:
        with translated(folder):
            found = connection.execute(sql, (last, batch_rows)).fetchall()
        if not found:
            return
        last = found[-1][0]
        yield from found


def _write(folder: Path, held: Sequence[tuple[RowIds, Vectors]]) -> SegmentRow:
    import numpy as np

    row_ids = np.concatenate([ids for ids, _ in held])
    vectors = np.concatenate([part for _, part in held])
    with translated(folder, vectors.nbytes):
        return write_vector_segment(folder, row_ids, vectors)


def _check(vectors: Vectors, rows: int, dim: int) -> None:
    import numpy as np

    if vectors.dtype != np.float32 or vectors.shape != (rows, dim) or not np.isfinite(vectors).all():
        raise UsageError(
            f"the embedder must give finite float32 vectors of shape ({rows}, {dim}), "
            f"got {vectors.dtype} {vectors.shape}"
        )
