"""Write transactions: everything of one generation becomes visible at once, or nothing of it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ragkit.store import faults
from ragkit.store.changes import Changes
from ragkit.store.connections import DATABASE, translated
from ragkit.store.locks import WriterLock
from ragkit.store.schema import set_meta
from ragkit.store.snapshots import read_meta


class Transactions:
    """Opens write transactions for the holder of the writer's lock."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: WriterLock) -> None:
        self._folder = folder
        self._connection = connection
        self._lock = lock

    @contextlib.contextmanager
    def open(self, needed_bytes: int = 0, *, same_generation: bool = False) -> Iterator[Changes]:
        """Give the changes of the next generation; they are committed durably when the block ends without an error.

        `same_generation` is for derived data, which changes nothing that a search could find.

        Raises:
            StoreSpaceError: the disk is full or failed; the transaction was rolled back.
        """
        database = self._folder / DATABASE
        with translated(self._folder, needed_bytes):
            faults.checkpoint("transaction:begin", database)
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                generation = int(read_meta(self._connection, "generation")) + (not same_generation)
                changes = Changes(self._connection, generation)
                yield changes
                changes.finish()
                set_meta(self._connection, "generation", str(generation))
                faults.checkpoint("transaction:commit", database)
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # a full disk may have rolled it back already
                    self._connection.execute("ROLLBACK")
                raise
        self._lock.note_generation(generation)
