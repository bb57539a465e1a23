"""The two locks of a store folder: one writer at a time, and readers that pin an older generation.

Both are `flock` locks, which the kernel drops when their owner dies. A forked child closes its copy at once, so that
a parser child never keeps a dead parent's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import weakref
import zlib
from datetime import UTC, datetime
from pathlib import Path

from ragkit.errors import StoreLockedError
from ragkit.store import faults

_log = logging.getLogger(__name__)
_POLL_S = 0.02


class _FileLock:
    """An open file with a `flock`; closed in every forked child."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _open_locks.add(self)

    def acquire(self, kind: int, timeout_s: float) -> bool:
        """Return whether the lock was had within the time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(self.descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_S)
            else:
                return True

    def release(self) -> None:
        """Give the lock back at once, even if a child that was just forked has not closed its copy yet."""
        if self.descriptor >= 0:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            self.close()

    def close(self) -> None:
        """Close this copy, which keeps the lock while another process holds one; harmless when called again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


_open_locks: weakref.WeakSet[_FileLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_open_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


class WriterLock:
    """The store's one writer. The file names its owner and, as a witness, the last generation that it committed."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._lock = _FileLock(path)
        if not self._lock.acquire(fcntl.LOCK_EX, timeout_s):
            owner = read_witness(path)
            self._lock.close()
            raise StoreLockedError(
                f"the store {path.parent} is being written by process {owner.get('pid', '?')} on "
                f"{owner.get('host', '?')} since {owner.get('since', '?')}; waited {timeout_s:g} s: "
                "wait for it to finish, stop it, or give a longer --lock-timeout"
            )
        self._generation = int(read_witness(path).get("generation", 0))
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._write()

    def note_generation(self, generation: int) -> None:
        """Record a committed generation. Written after the commit, so it is never ahead of an undamaged store."""
        self._generation = generation
        self._write()

    def release(self) -> None:
        """Let the next writer in."""
        self._lock.release()

    def _write(self) -> None:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": self._since}
        body = json.dumps({**owner, "generation": self._generation}).encode()
        line = b"%s %08x\n" % (body, zlib.crc32(body))
        # The witness is a convenience: a full disk must not undo a commit that has already happened.
        with contextlib.suppress(OSError):
            faults.checkpoint("lock:write", self._lock.path)
            os.pwrite(self._lock.descriptor, line, 0)
            os.ftruncate(self._lock.descriptor, len(line))


def read_witness(path: Path) -> dict[str, str | int]:
    """Return what the lock file says about its last owner; empty where it is absent or unreadable."""
    try:
        body, _, crc = path.read_bytes().rstrip(b"\n").rpartition(b" ")
        if int(crc, 16) != zlib.crc32(body):
            return {}
        witness = json.loads(body)
    except (OSError, ValueError):
        return {}
    return witness if isinstance(witness, dict) else {}


class ReaderPin:
    """A shared lock for as long as any thread of this process reads a pinned generation.

    `gc` removes files only while it holds the same lock alone, so what a pinned generation names stays on disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mutex = threading.Lock()
        self._lock: _FileLock | None = None
        self._pins = 0
        self._pid = os.getpid()

    def pin(self, timeout_s: float = 60.0) -> None:
        """Take part in the shared lock.

        Raises:
            StoreLockedError: somebody erases or collects for longer than the time-out.
        """
        if self._pid != os.getpid():  # after a fork: the parent's mutex and pins are not ours
            self._mutex, self._lock, self._pins, self._pid = threading.Lock(), None, 0, os.getpid()
        with self._mutex:
            if self._pins == 0:
                self._lock = self._lock or _FileLock(self._path)
                if not self._lock.acquire(fcntl.LOCK_SH, timeout_s):
                    raise StoreLockedError(
                        f"the store {self._path.parent} is being erased or collected; waited {timeout_s:g} s: try again"
                    )
            self._pins += 1

    def unpin(self) -> None:
        """Leave the shared lock; the last one out releases it."""
        if self._pid != os.getpid():
            return
        with self._mutex:
            self._pins -= 1
            if self._pins == 0 and self._lock is not None:
                fcntl.flock(self._lock.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class NoReaders:
    """Holds the readers' lock alone: `acquired` says whether that worked within the time."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._lock = _FileLock(path)
        self.acquired = self._lock.acquire(fcntl.LOCK_EX, timeout_s)

    def __enter__(self) -> NoReaders:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
