"""Reads of vectors: every live row of every vector segment, memory-mapped."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.store.records import VectorPart, VectorTable
from ragkit.store.rows import SEGMENT_COLUMNS, SegmentRow, checked
from ragkit.store.segments import VECTOR_SEGMENT, live_mask, map_vector_segment

if TYPE_CHECKING:
    from ragkit.store.records import RowIds


def read_segments(connection: sqlite3.Connection, kind: str | None = None) -> list[SegmentRow]:
    """Return the segments of one kind (all for None) in order of their first row, each row checked."""
    sql = f"SELECT {SEGMENT_COLUMNS}, crc FROM segments"  # noqa: S608 - a constant
    condition, values = (" WHERE kind = ?", (kind,)) if kind else ("", ())
    segments = []
    for row in connection.execute(f"{sql}{condition} ORDER BY first_row, segment_id", values):
        segment = SegmentRow(*row[:-1])
        checked("segment", segment.sha256, row[-1], segment.crc)
        segments.append(segment)
    return segments


def read_vectors(connection: sqlite3.Connection, folder: Path, generation: int, dim: int) -> VectorTable:
    """Return every live vector in ascending order of row id.

    Segments whose rows all live are handed out as they are mapped; of others the live rows are copied.
    """
    import numpy as np

    parts = []
    for segment in read_segments(connection, VECTOR_SEGMENT):
        row_ids, vectors = map_vector_segment(folder, segment)
        if segment.live_rows < segment.rows:
            mask = live_mask(segment)
            row_ids, vectors = row_ids[mask], vectors[mask]
        parts.append(VectorPart(row_ids, vectors))
    all_ids = np.concatenate([part.row_ids for part in parts]) if parts else np.empty(0, dtype=np.int64)
    return VectorTable(generation, dim, all_ids, tuple(parts))


def ids_digest(row_ids: RowIds) -> str:
    """Return the sha256 that identifies a set of row ids, in ascending order."""
    import numpy as np

    return hashlib.sha256(np.sort(np.asarray(row_ids, dtype=np.int64)).astype("<i8").tobytes()).hexdigest()
