"""Garbage collection and erasure.

Files are only removed while no reader of any process pins a generation (`NoReaders`), so a pinned generation keeps
what it names. Rows that a compaction moves keep their ids.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from ragkit.errors import StoreLockedError
from ragkit.store import faults
from ragkit.store.connections import DATABASE, translated
from ragkit.store.derived import INDEX_FOLDER, entries_of, put_kv, read_records, write_kv
from ragkit.store.files import folder_bytes, sync_folder
from ragkit.store.locks import NoReaders
from ragkit.store.records import GcReport
from ragkit.store.rows import SegmentRow
from ragkit.store.schema import set_meta
from ragkit.store.segments import (
    KV_SEGMENT,
    VECTOR_SEGMENT,
    live_mask,
    map_vector_segment,
    segment_path,
    write_vector_segment,
)
from ragkit.store.snapshots import READERS_LOCK
from ragkit.store.transactions import Transactions
from ragkit.store.vectors import read_segments

ERASE_PENDING = "erase_pending"
SPARSE_SHARE = 0.5
SMALL_BYTES = 4 << 20  # neighbouring segments below this are merged, or daily ingests would leave thousands of files
MERGED_BYTES = 64 << 20
VACUUM_SHARE = 0.25


def collect(
    folder: Path, connection: sqlite3.Connection, transactions: Transactions, reader_timeout_s: float
) -> GcReport:
    """Rewrite segments that are less than half live, merge small ones of vectors, and remove unreferenced files."""
    before = folder_bytes(folder)
    rewritten = _compact(folder, connection, transactions, _is_sparse, merge=True)
    rewritten += _compact_kv(folder, connection, transactions)
    removed, pending = remove_unreferenced(folder, connection, reader_timeout_s)
    with translated(folder):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        free = connection.execute("PRAGMA freelist_count").fetchone()[0]
        if free > VACUUM_SHARE * pages:
            _vacuum(folder, connection)
        _truncate_log(folder, connection, timeout_s=0.0)
    return GcReport(max(0, before - folder_bytes(folder)), removed, rewritten, pending)


def remove_unreferenced(folder: Path, connection: sqlite3.Connection, timeout_s: float) -> tuple[int, int]:
    """Remove segment, index and temporary files that the catalogue does not name; return (removed, still pinned).

    The caller holds the writer's lock, so no file is just being written.
    """
    with translated(folder):
        garbage = list(unreferenced_files(folder, connection))
        if not garbage:
            return 0, 0
        with NoReaders(folder / READERS_LOCK, timeout_s) as alone:
            if not alone.acquired:
                return 0, len(garbage)
            for path in garbage:
                faults.checkpoint("file:remove", path)
                path.unlink(missing_ok=True)
        for parent in {path.parent for path in garbage}:
            sync_folder(parent)
            with contextlib.suppress(OSError):
                parent.rmdir()  # only succeeds where nothing is left in it
    return len(garbage), 0


def unreferenced_files(folder: Path, connection: sqlite3.Connection) -> Iterator[Path]:
    """Yield every file below segments/ and index/ that the catalogue does not name."""
    named = {segment_path(folder, segment.sha256, segment.kind) for segment in read_segments(connection)}
    for (name,) in connection.execute("SELECT name FROM vector_index"):
        named.add(folder / INDEX_FOLDER / str(name))
    for place in (folder / "segments", folder / INDEX_FOLDER):
        yield from (path for path in place.rglob("*") if path.is_file() and path not in named)


def scrub(folder: Path, connection: sqlite3.Connection, transactions: Transactions, timeout_s: float) -> None:
    """Finish an erasure: no byte of unlinked text, vectors or KV stays in any file of the store.

    Raises:
        StoreLockedError: readers pinned older generations for the whole of a time-out above 0.
    """
    _compact(folder, connection, transactions, lambda segment: segment.live_rows < segment.rows, merge=False)
    with transactions.open(same_generation=True) as changes:
        changes.connection.execute("DELETE FROM vector_index")  # an index holds vectors; it is rebuilt on demand
        for segment in read_segments(changes.connection, KV_SEGMENT):
            sql = "SELECT count(*) FROM kv WHERE segment_id = ?"
            if changes.connection.execute(sql, (segment.segment_id,)).fetchone()[0] < segment.rows:
                changes.drop_segment(segment.segment_id)  # what else it holds is recomputed
    _, pending = remove_unreferenced(folder, connection, timeout_s)
    with translated(folder):
        _vacuum(folder, connection)
        busy = _truncate_log(folder, connection, timeout_s)
    if pending or busy:
        if timeout_s > 0:
            raise StoreLockedError(
                f"the sources are removed, but a reader of {folder} still pins an older generation, so their bytes "
                f"could not be overwritten within {timeout_s:g} s: stop the reader and run `ragkit gc`"
            )
        return
    with transactions.open(same_generation=True) as changes:
        set_meta(changes.connection, ERASE_PENDING, "0")
    with translated(folder):
        _truncate_log(folder, connection, timeout_s)


def _vacuum(folder: Path, connection: sqlite3.Connection) -> None:
    faults.checkpoint("catalogue:vacuum", folder / DATABASE)
    connection.execute("PRAGMA temp_store = FILE")  # the copy holds live rows only, and may not fit into memory
    try:
        connection.execute("VACUUM")
    finally:
        connection.execute("PRAGMA temp_store = MEMORY")


def _truncate_log(folder: Path, connection: sqlite3.Connection, timeout_s: float) -> bool:
    """Move the write-ahead log into the catalogue and empty it; return whether a reader prevented that."""
    with NoReaders(folder / READERS_LOCK, timeout_s) as alone:
        if not alone.acquired:  # a checkpoint would wait for the readers as long as the busy time-out says
            return True
        faults.checkpoint("catalogue:checkpoint", folder / DATABASE)
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        return bool(busy)


def _is_sparse(segment: SegmentRow) -> bool:
    return segment.live_rows < SPARSE_SHARE * segment.rows


def _compact(
    folder: Path,
    connection: sqlite3.Connection,
    transactions: Transactions,
    is_due: Callable[[SegmentRow], bool],
    *,
    merge: bool,
) -> int:
    """Write the live rows of due segments into new ones, one transaction each; return how many were replaced."""
    with translated(folder):
        segments = read_segments(connection, VECTOR_SEGMENT)
    replaced = 0
    for run in _runs(segments, is_due, merge=merge):
        with translated(folder, sum(segment.bytes for segment in run)):
            new = _rewrite(folder, run)
        with transactions.open(same_generation=True) as changes:
            for segment in run:
                changes.drop_segment(segment.segment_id)
            changes.put_segment(new)
        replaced += len(run)
    return replaced


def _compact_kv(folder: Path, connection: sqlite3.Connection, transactions: Transactions) -> int:
    """Write the entries of KV segments that are mostly dead into new ones; return how many were replaced."""
    with translated(folder):
        segments = read_segments(connection, KV_SEGMENT)
    replaced = 0
    for segment in segments:
        with translated(folder):
            entries = entries_of(connection, segment.segment_id)
        if sum(entry.bytes for entry in entries) >= SPARSE_SHARE * segment.bytes:
            continue
        with translated(folder, segment.bytes):
            whole, parts = read_records(segment_path(folder, segment.sha256, KV_SEGMENT), entries)
            new = write_kv(folder, parts, whole) if whole else None
        with transactions.open(same_generation=True) as changes:
            changes.drop_segment(segment.segment_id)
            if new is not None:
                put_kv(changes, new, whole)
        replaced += 1
    return replaced


def _runs(
    segments: list[SegmentRow], is_due: Callable[[SegmentRow], bool], *, merge: bool
) -> Iterator[list[SegmentRow]]:
    """Yield runs of neighbours to be written as one segment: due ones, and at least two small ones in a row."""
    run: list[SegmentRow] = []
    for segment in segments:
        eligible = is_due(segment) or (merge and _live_bytes(segment) < SMALL_BYTES)
        full = run and (not merge or sum(map(_live_bytes, run)) + _live_bytes(segment) > MERGED_BYTES)
        if run and (full or not eligible):
            if len(run) > 1 or is_due(run[0]):
                yield run
            run = []
        if eligible:
            run.append(segment)
    if run and (len(run) > 1 or is_due(run[0])):
        yield run


def _live_bytes(segment: SegmentRow) -> int:
    return segment.live_rows * segment.dim * 4


def _rewrite(folder: Path, run: list[SegmentRow]) -> SegmentRow:
    import numpy as np

    ids, parts = [], []
    for segment in run:
        row_ids, vectors = map_vector_segment(folder, segment)
        mask = live_mask(segment)
        ids.append(row_ids[mask])
        parts.append(vectors[mask])
    return write_vector_segment(folder, np.concatenate(ids), np.concatenate(parts))
