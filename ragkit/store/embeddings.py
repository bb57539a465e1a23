"""Embedding a whole store anew: new segments first, then one transaction that changes over."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.errors import UsageError
from ragkit.store.connections import translated
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
    embed: Callable[[Sequence[str]], Vectors],
    batch_rows: int,
) -> int:
    """Embed the text of every chunk and change over to the new vectors in one transaction; return the rows.

    The old vectors stay visible until then. Memory holds one segment at most.
    """
    segments: list[SegmentRow] = []
    held: list[tuple[RowIds, Vectors]] = []
    rows = held_bytes = 0

    for row_ids, texts in _batches(folder, connection, batch_rows):
        vectors = embed(texts)
        _check(vectors, len(texts), dim)
        held.append((row_ids, vectors))
        rows += len(texts)
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


def _batches(folder: Path, connection: sqlite3.Connection, batch_rows: int) -> Iterator[tuple[RowIds, list[str]]]:
    import numpy as np

    sql = f"SELECT {CHUNK_COLUMNS}, CAST(text AS BLOB), crc FROM chunks WHERE row_id > ? ORDER BY row_id LIMIT ?"  # noqa: S608
    last = -1
    while True:
        with translated(folder):
            found = connection.execute(sql, (last, batch_rows)).fetchall()
        if not found:
            return
        last = found[-1][0]
        yield np.array([row[0] for row in found], dtype=np.int64), [checked_chunk_text(row) for row in found]


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
