"""SQLite connections: one a thread and process, and SQLite's errors in ragkit's words."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from ragkit.errors import StoreCorruptError, StoreError, StoreLockedError, StoreSpaceError

BUSY_TIMEOUT_MS = 60_000
WAL_LIMIT_BYTES = 64 << 20  # a log that one large commit blew up shrinks to this again
DATABASE = "ragkit.db"

_inherited: list[object] = []  # connections of a parent process: never used, and never closed by a child either
_pools: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()


def connect(folder: Path, *, writable: bool = False) -> sqlite3.Connection:
    """Return a connection to the catalogue in `folder`, which must exist, with every safety setting on."""
    uri = (folder.resolve() / DATABASE).as_uri() + "?mode=rw"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        connection.execute("PRAGMA temp_store = MEMORY")  # no text of the store in temporary files
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        if not writable:
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


class ThreadState(threading.local):
    """What one thread holds: its connection and the snapshot it has pinned."""

    pid: int = -1
    connection: sqlite3.Connection | None = None
    depth: int = 0
    generation: int = 0


class ConnectionPool:
    """Hands every thread of every process its own read connection."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = ThreadState()
        self._mutex = threading.Lock()
        self._connections: list[tuple[weakref.ref[threading.Thread], sqlite3.Connection]] = []
        self._closed = False
        _pools.add(self)

    def state(self) -> ThreadState:
        """Return this thread's state with a usable connection: a fork or a first use opens a fresh one."""
        if self._closed:
            raise StoreError(f"the store {self._folder} is closed: open it again")
        state = self._state
        if state.pid != os.getpid():
            state.connection, state.depth, state.pid = self._open(), 0, os.getpid()
        return state

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._mutex:
            self._closed = True
            for _, connection in self._connections:
                connection.close()
            self._connections.clear()

    def forget_inherited(self) -> None:
        """Set the parent's connections aside in a forked child: SQLite forbids using and closing them there."""
        self._mutex = threading.Lock()
        _inherited.extend(connection for _, connection in self._connections)
        self._connections = []

    def _open(self) -> sqlite3.Connection:
        connection = connect(self._folder)
        with self._mutex:
            for thread, stale in [entry for entry in self._connections if _is_dead(entry[0]())]:
                stale.close()
                self._connections.remove((thread, stale))
            self._connections.append((weakref.ref(threading.current_thread()), connection))
        return connection


def _is_dead(thread: threading.Thread | None) -> bool:
    return thread is None or not thread.is_alive()


def _forget_in_child() -> None:
    for pool in list(_pools):
        pool.forget_inherited()


os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def translated(folder: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn SQLite's and the operating system's errors into the store's; `needed_bytes` is what was to be written."""
    try:
        yield
    except sqlite3.Error as error:
        raise _of_sqlite(folder, error, needed_bytes) from error
    except UnicodeDecodeError as error:  # SQLite's messages quote rotten table definitions
        raise _damaged(folder, error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise space_error(folder, str(error), needed_bytes) from error
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"the store {folder} could not be read or written: {error}") from error


def space_error(folder: Path, reason: str, needed_bytes: int) -> StoreSpaceError:
    """Return the error that says how much was to be written and how much room there is."""
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except OSError:
        free = "the free space cannot be told"
    needed = f"about {needed_bytes / 1e6:,.1f} MB ({needed_bytes} bytes) were needed, " if needed_bytes else ""
    return StoreSpaceError(
        f"writing the store {folder} failed ({reason}); {needed}{free}: nothing of this step was kept, "
        "make room and run the same command again"
    )


def _of_sqlite(folder: Path, error: sqlite3.Error, needed_bytes: int) -> StoreError:
    name: str = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith("SQLITE_FULL"):
        return space_error(folder, str(error), needed_bytes)
    undecodable = "decode to UTF-8" in str(error) or "malformed" in str(error)
    unreadable = name in ("SQLITE_IOERR_READ", "SQLITE_IOERR_SHORT_READ", "SQLITE_IOERR_CORRUPTFS")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT")) or undecodable or unreadable:
        return _damaged(folder, error)
    if name.startswith("SQLITE_IOERR"):
        return space_error(folder, f"{error}, {name}", needed_bytes)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreLockedError(f"the catalogue {folder / DATABASE} stayed locked ({error}): try again")
    return StoreError(f"the catalogue {folder / DATABASE} could not be used ({error}, {name or type(error).__name__})")


def _damaged(folder: Path, error: Exception) -> StoreCorruptError:
    return StoreCorruptError(
        f"the catalogue {folder / DATABASE} is damaged ({error}): run `ragkit verify` to see what is affected; "
        "if it cannot be repaired, ingest the sources into a new store"
    )
