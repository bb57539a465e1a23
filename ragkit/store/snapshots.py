"""Pinned reads: one read transaction, and a shared lock that keeps the generation's files on disk."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ragkit.errors import StoreCorruptError, StoreMissingError
from ragkit.store.connections import DATABASE, ConnectionPool, translated
from ragkit.store.locks import ReaderPin
from ragkit.store.rows import checked, row_crc

WRITER_LOCK = "lock"
READERS_LOCK = "readers.lock"


class Snapshots:
    """Opens read transactions on the catalogue of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ConnectionPool(folder)
        self._pin = ReaderPin(folder / READERS_LOCK)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give this thread's connection inside a read transaction; nested uses share the outermost one's."""
        with translated(self.folder):
            state = self._pool.state()
            connection = state.connection
            assert connection is not None
            if state.depth == 0:
                self._begin(connection)
            state.depth += 1
            owner = os.getpid()
            try:
                if state.depth == 1:  # the first read is what pins the generation
                    state.generation = int(read_meta(connection, "generation"))
                yield connection
            finally:
                if os.getpid() == owner:  # a child that was forked inside the block must leave the parent's alone
                    state.depth -= 1
                    if state.depth == 0:
                        self._end(connection)

    def generation(self) -> int:
        """Return the generation this thread has pinned, or the last committed one."""
        with self.reading():
            return self._pool.state().generation

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()
        self._pin.close()

    def _begin(self, connection: sqlite3.Connection) -> None:
        self._pin.pin()
        try:
            connection.execute("BEGIN")
        except BaseException:
            self._pin.unpin()
            raise

    def _end(self, connection: sqlite3.Connection) -> None:
        try:
            with contextlib.suppress(sqlite3.Error):  # closed by another thread, or a failed read ended it already
                connection.execute("COMMIT")
        finally:
            self._pin.unpin()


def read_meta(connection: sqlite3.Connection, key: str, default: str | None = None) -> str:
    """Return one store-wide value, or `default` where it was never set.

    Raises:
        StoreCorruptError: it is missing without a default, or its bytes rotted.
    """
    row = connection.execute("SELECT value, crc FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        if default is None:
            raise StoreCorruptError(
                f"stored bytes are damaged: the catalogue has lost its {key!r}; run `ragkit verify`"
            )
        return default
    checked("meta", key, row[1], row_crc(key, row[0]))
    return str(row[0])


def require_store(folder: Path) -> None:
    """Raise `StoreMissingError` unless there is a catalogue in `folder`."""
    if not (folder / DATABASE).is_file():
        raise missing_store(folder)


def missing_store(folder: Path) -> StoreMissingError:
    """Return the error that says how a store is made."""
    return StoreMissingError(
        f"there is no store in {folder}: `ragkit ingest SOURCE` makes one, or name another folder with --store"
    )
