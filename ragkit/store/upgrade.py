"""Upgrades of the catalogue's format, one step a version, each a single transaction.

Version 1 had neither KV references nor the content that a source's visible documents come from; version 2 had no
metadata of chunks, and its chunks have none until their document is read again.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from ragkit.errors import StoreCorruptError, StoreFormatError
from ragkit.store import faults
from ragkit.store.connections import DATABASE, connect
from ragkit.store.locks import WriterLock
from ragkit.store.rows import checked, row_crc
from ragkit.store.schema import FORMAT_VERSION, KV_TABLE, create_statement, run_script, set_meta
from ragkit.store.snapshots import WRITER_LOCK, read_meta
from ragkit.store.sources import SOURCE_COLUMNS

_log = logging.getLogger(__name__)

_SOURCE_COLUMNS_1 = SOURCE_COLUMNS.replace("indexed_sha256, ", "")


def upgrade(folder: Path, lock_timeout_s: float = 10.0) -> None:
    """Bring the store in `folder` to this package's format, holding the writer's lock.

    Raises:
        StoreFormatError: it was written by a newer ragkit.
        StoreLockedError: another process is writing.
    """
    lock = WriterLock(folder / WRITER_LOCK, lock_timeout_s)
    try:
        connection = connect(folder, writable=True)
        try:
            # dropping a table that others refer to would otherwise delete their rows as well
            connection.execute("PRAGMA foreign_keys = OFF")
            _upgrade(folder, connection)
        finally:
            connection.close()
    finally:
        lock.release()


def check_version(folder: Path, version: int) -> bool:
    """Return whether a store of this format has to be upgraded.

    Raises:
        StoreFormatError: it was written by a newer ragkit.
    """
    if version > FORMAT_VERSION:
        raise StoreFormatError(
            f"the store {folder} has format {version}, this ragkit writes format {FORMAT_VERSION}: upgrade ragkit"
        )
    if version < 1:
        raise StoreFormatError(f"the store {folder} has the impossible format {version}: it is damaged or no store")
    return version < FORMAT_VERSION


def _upgrade(folder: Path, connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = int(read_meta(connection, "format_version"))
        while check_version(folder, version):
            _log.info("upgrading the store %s from format %d to %d", folder, version, version + 1)
            _STEPS[version](connection)
            version += 1
            set_meta(connection, "format_version", str(version))
        broken = connection.execute("PRAGMA foreign_key_check").fetchone()
        if broken is not None:
            raise StoreCorruptError(f"the store {folder} cannot be upgraded: a row of {broken[0]} refers to nothing")
        faults.checkpoint("transaction:commit", folder / DATABASE)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _from_1_to_2(connection: sqlite3.Connection) -> None:
    """Add KV references, and `sources.indexed_sha256`: version 1 kept a failed source's last good content nowhere."""
    run_script(connection, KV_TABLE)
    rows = connection.execute(f"SELECT {_SOURCE_COLUMNS_1}, crc FROM sources").fetchall()  # noqa: S608
    linked = {source_id for (source_id,) in connection.execute("SELECT DISTINCT source_id FROM links")}
    connection.execute("DROP TABLE sources")
    run_script(connection, create_statement("TABLE sources") + ";\n" + create_statement("INDEX sources_by_content"))
    for *values, crc in rows:
        checked("source", values[1], crc, row_crc(*values))
        visible = values[2] if values[8] == "ok" and values[0] in linked else ""
        row = (*values[:13], visible, values[13])
        marks = ",".join("?" * (len(row) + 1))
        connection.execute(f"INSERT INTO sources ({SOURCE_COLUMNS}, crc) VALUES ({marks})", (*row, row_crc(*row)))  # noqa: S608


def _from_2_to_3(connection: sqlite3.Connection) -> None:
    """Add the metadata of chunks. No row is rewritten: `chunk_crc` leaves out metadata that is empty."""
    connection.execute("ALTER TABLE chunks ADD COLUMN metadata TEXT NOT NULL DEFAULT ''")


_STEPS: dict[int, Callable[[sqlite3.Connection], None]] = {1: _from_1_to_2, 2: _from_2_to_3}
