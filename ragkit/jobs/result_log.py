"""The finished rows of a job: one append-only file, a checksum a line, and where each row lies in it."""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from ragkit.errors import StoreSpaceError
from ragkit.store import faults

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not become larger here (`ulimit -f`, or the file system)",
}


class ResultLog:
    """Rows by number. What `append` returned from is on disk; a torn or damaged line is a row that is not done.

    Args:
        path: the file; made where there is none, and cut to its last whole line.
        total: how many rows the job has.

    Attributes:
        done: how many of them are here.
    """

    def __init__(self, path: Path, total: int) -> None:
        self._path = path
        self._offsets = array("q", [-1]) * total
        self._lengths = array("q", [0]) * total
        self.done = 0
        self._size = self._scan()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._descriptor, self._size)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __contains__(self, number: int) -> bool:
        return self._offsets[number] >= 0

    def append(self, rows: Iterable[tuple[int, bytes]]) -> bytes:
        """Write rows given as number and JSON, sync them, and return the bytes written.

        Raises:
            StoreSpaceError: the disk is full; none of these rows is done, and the file is as it was.
        """
        added: list[tuple[int, int, int]] = []
        group = bytearray()
        for number, row in rows:
            line = line_of(number, row)
            added.append((number, self._size + len(group) + len(line) - len(row) - 1, len(row)))
            group += line
        try:
            faults.checkpoint("batch:append", self._path)
            _write_all(self._descriptor, group, self._size)
            faults.checkpoint("batch:fsync", self._path)
            os.fsync(self._descriptor)
        except BaseException as error:  # a signal may come while the group is being written, too
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            if isinstance(error, OSError) and (full := no_room(error)):
                raise StoreSpaceError(
                    f"{full}: {len(group):,} bytes of answers could not be written to {self._path.parent}; "
                    "make room and run the same command: it goes on with the rest"
                ) from error
            raise
        self._size += len(group)
        for place in added:
            self._note(*place)
        return bytes(group)

    def rows(self) -> Iterator[bytes]:
        """Yield the JSON of every row that is done, by number."""
        for offset, length in zip(self._offsets, self._lengths, strict=True):
            if offset >= 0:
                yield os.pread(self._descriptor, length, offset)

    def _note(self, number: int, offset: int, length: int) -> None:
        self.done += number not in self
        self._offsets[number], self._lengths[number] = offset, length

    def _scan(self) -> int:
        """Note the rows that are there, and return the size up to the last whole line."""
        size = 0
        if self._path.exists():
            with self._path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    number = _number_of(line)
                    if number is not None and number < len(self._offsets):
                        start = line.index(b" ", 9) + 1
                        self._note(number, size + start, len(line) - start - 1)
                    size += len(line)
        return size


def no_room(error: OSError) -> str:
    """Return why there is no more room, where that is what `error` says; else an empty text."""
    return _FULL.get(error.errno or 0, "")


def line_of(number: int, row: bytes) -> bytes:
    """Return a row as a line: checksum, number and JSON."""
    body = b"%d %b" % (number, row)
    return b"%08x %b\n" % (zlib.crc32(body), body)


def _number_of(line: bytes) -> int | None:
    """Return the number of the row in a whole line, None where it is damaged."""
    checksum, _, body = line[:-1].partition(b" ")
    try:
        if len(checksum) == 8 and int(checksum, 16) == zlib.crc32(body):
            return int(body.partition(b" ")[0])
    except ValueError:
        pass
    return None


def _write_all(descriptor: int, data: bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
