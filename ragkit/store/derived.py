"""Derived files that the catalogue vouches for: the vector index and KV segments."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.errors import UsageError
from ragkit.store.changes import Changes
from ragkit.store.files import digest_file, write_file_atomically
from ragkit.store.kv_heirs import KV_COLUMNS
from ragkit.store.records import IndexRecord, KVEntry, KVTotals
from ragkit.store.rows import SegmentRow, checked, row_crc
from ragkit.store.segments import KV_SEGMENT, segment_path, write_kv_segment
from ragkit.store.vectors import ids_digest
from ragkit.types import MetadataValue

if TYPE_CHECKING:
    from ragkit.store.records import RowIds

INDEX_FOLDER = "index"
_COLUMNS = "generation, name, kind, sha256, ids_sha256, rows, params"

_log = logging.getLogger(__name__)
_checked_files: set[tuple[str, int, int, int]] = set()


def write_index(
    folder: Path,
    generation: int,
    row_ids: RowIds,
    kind: str,
    params: Mapping[str, MetadataValue],
    write: Callable[[Path], None],
) -> IndexRecord:
    """Write an index file durably and return its record, which is not in the catalogue yet."""
    path = folder / INDEX_FOLDER / f"{generation}.faiss"
    attempt = 1
    while path.exists():  # a reader may be using the last one for the same generation
        attempt += 1
        path = path.with_name(f"{generation}-{attempt}.faiss")
    write_file_atomically(path, write)
    return IndexRecord(
        generation=generation,
        path=path,
        kind=kind,
        sha256=digest_file(path).sha256,
        ids_sha256=ids_digest(row_ids),
        rows=len(row_ids),
        params=dict(params),
    )


def put_index(connection: sqlite3.Connection, record: IndexRecord) -> None:
    """Record an index within the open transaction, in place of the last one."""
    values = (record.generation, record.path.name, record.kind, record.sha256, record.ids_sha256, record.rows)
    row = (*values, json.dumps(dict(record.params)))
    connection.execute("DELETE FROM vector_index")
    sql = f"INSERT INTO vector_index (slot, {_COLUMNS}, crc) VALUES (1,?,?,?,?,?,?,?,?)"  # noqa: S608
    connection.execute(sql, (*row, row_crc(*row)))


def read_index(connection: sqlite3.Connection, folder: Path) -> IndexRecord | None:
    """Return the recorded index, or None."""
    row = connection.execute(f"SELECT {_COLUMNS}, crc FROM vector_index").fetchone()  # noqa: S608
    if row is None:
        return None
    checked("index", row[1], row[7], row_crc(*row[:7]))
    name = os.path.basename(row[1])
    path = folder / INDEX_FOLDER / name
    return IndexRecord(row[0], path, row[2], row[3], row[4], row[5], json.loads(row[6]))


def is_intact(record: IndexRecord) -> bool:
    """Return whether an index file is there with the recorded sha256; a success is remembered by the process."""
    try:
        status = record.path.stat()
        identity = (record.sha256, status.st_ino, status.st_size, status.st_mtime_ns)
        if identity in _checked_files:
            return True
        intact = digest_file(record.path).sha256 == record.sha256
    except OSError as error:
        _log.warning("the index %s cannot be read (%s): it has to be built anew", record.path.name, error)
        return False
    if not intact:
        _log.warning("the index %s is damaged: it has to be built anew", record.path.name)
        return False
    _checked_files.add(identity)
    return True


def write_kv(folder: Path, parts: Iterable[bytes | memoryview], entries: Sequence[KVEntry]) -> SegmentRow:
    """Write a KV segment durably, check that the entries lie within it, and return its catalogue row."""
    segment = write_kv_segment(folder, parts, len(entries))
    with segment_path(folder, segment.sha256, KV_SEGMENT).open("rb") as file:
        for entry in entries:
            file.seek(entry.offset)
            content = file.read(entry.bytes)
            if len(content) != entry.bytes or zlib.crc32(content) != entry.crc32:
                raise UsageError(f"KV entry {entry.key} does not lie in its segment with the given checksum")
    return segment


def put_kv(changes: Changes, segment: SegmentRow, entries: Sequence[KVEntry]) -> None:
    """Record a KV segment and its entries within the open transaction; known keys move to the new segment."""
    segment_id = changes.put_segment(segment)
    (next_id,) = changes.connection.execute("SELECT ifnull(max(kv_id), 0) + 1 FROM kv").fetchone()
    for kv_id, entry in enumerate(entries, next_id):
        row = (kv_id, entry.key, entry.chunk_id, segment_id, entry.offset, entry.bytes, entry.crc32)
        sql = f"INSERT OR REPLACE INTO kv ({KV_COLUMNS}, crc) VALUES (?,?,?,?,?,?,?,?)"  # noqa: S608
        changes.connection.execute(sql, (*row, row_crc(*row)))


def drop_kv(changes: Changes, keys: Sequence[str]) -> None:
    """Forget KV entries, and the segments that hold no other, within the open transaction."""
    changes.connection.executemany("DELETE FROM kv WHERE key = ?", ((key,) for key in keys))
    changes.connection.execute(
        "DELETE FROM segments WHERE kind = ? AND segment_id NOT IN (SELECT segment_id FROM kv)", (KV_SEGMENT,)
    )


def list_kv(connection: sqlite3.Connection, folder: Path) -> list[tuple[Path, KVEntry]]:
    """Return where every KV entry lies, oldest first; rows that rotted are left out."""
    columns = ", ".join(f"kv.{name}" for name in KV_COLUMNS.split(", "))
    sql = f"SELECT {columns}, kv.crc, s.sha256, s.kind FROM kv JOIN segments s USING (segment_id) ORDER BY kv.kv_id"  # noqa: S608
    return [
        (segment_path(folder, row[8], row[9]), KVEntry(row[1], row[2], row[4], row[5], row[6]))
        for row in connection.execute(sql)
        if row_crc(*row[:7]) == row[7]
    ]


def entries_of(connection: sqlite3.Connection, segment_id: int) -> list[KVEntry]:
    """Return the KV entries of one segment in order of place; rows that rotted are left out."""
    sql = f"SELECT {KV_COLUMNS}, crc FROM kv WHERE segment_id = ? ORDER BY offset"  # noqa: S608
    return [
        KVEntry(row[1], row[2], row[4], row[5], row[6])
        for row in connection.execute(sql, (segment_id,))
        if row_crc(*row[:7]) == row[7]
    ]


def read_records(path: Path, entries: Sequence[KVEntry]) -> tuple[list[KVEntry], list[bytes]]:
    """Return the entries that are whole in the file, placed behind each other, and their bytes."""
    whole: list[KVEntry] = []
    parts: list[bytes] = []
    offset = 0
    try:
        with path.open("rb") as file:
            for entry in entries:
                file.seek(entry.offset)
                content = file.read(entry.bytes)
                if len(content) == entry.bytes and zlib.crc32(content) == entry.crc32:
                    whole.append(replace(entry, offset=offset))
                    parts.append(content)
                    offset += entry.bytes
    except OSError as error:
        _log.warning("KV is lost and will be computed again: %s", error)
    return whole, parts


def total_kv(connection: sqlite3.Connection) -> KVTotals:
    """Return how much KV the catalogue names."""
    (entries,) = connection.execute("SELECT count(*) FROM kv").fetchone()
    sql = "SELECT ifnull(sum(bytes), 0) FROM segments WHERE kind = ?"
    (nbytes,) = connection.execute(sql, (KV_SEGMENT,)).fetchone()
    return KVTotals(entries, nbytes)


def read_kv(connection: sqlite3.Connection, folder: Path, keys: Sequence[str]) -> dict[str, tuple[Path, KVEntry]]:
    """Return where the known ones of these KV keys lie."""
    columns = ", ".join(f"kv.{name}" for name in KV_COLUMNS.split(", "))
    sql = f"SELECT {columns}, kv.crc, s.sha256, s.kind FROM kv JOIN segments s USING (segment_id) WHERE kv.key = ?"  # noqa: S608
    found = {}
    paths: dict[str, Path] = {}  # a segment has many entries, and to put a path together takes longer than the query
    for key in keys:
        row = connection.execute(sql, (key,)).fetchone()
        if row is not None:
            checked("kv", key, row[7], row_crc(*row[:7]))
            path = paths.get(row[8]) or paths.setdefault(row[8], segment_path(folder, row[8], row[9]))
            found[key] = (path, KVEntry(row[1], row[2], row[4], row[5], row[6]))
    return found
