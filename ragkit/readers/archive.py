"""Reads members of a zip archive against ceilings; nothing is ever written, and archives within it are not opened."""

from __future__ import annotations

import os
import posixpath
import struct
import zipfile
import zlib
from pathlib import Path
from urllib.parse import unquote

from ragkit.errors import ReadError
from ragkit.readers.base import ReadLimits

_BLOCK = 256 * 1024
_RATIO_FROM = 1 << 20
_END_RECORD = struct.Struct("<4s4H2LH")
_END_MAGIC = b"PK\x05\x06"
_MAX_COMMENT = 65535
_BYTES_A_MEMBER = 1024  # of the directory, on average; real ones take about 100
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class SafeArchive:
    """An open zip archive that gives its members by name.

    Raises:
        ReadError: `corrupt`, `encrypted`, or `too_large` for whatever passes a limit.
    """

    def __init__(self, path: Path, limits: ReadLimits) -> None:
        self._limits = limits
        self._read_bytes = 0
        _check_directory_size(path, limits)
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, struct.error, EOFError) as error:
            raise ReadError(f"not readable as a zip archive: {error}", code="corrupt") from error
        names = self._zip.namelist()
        if len(names) > limits.max_members:
            self._zip.close()
            raise _too_large(f"{len(names)} files in the archive", limits.max_members)
        self.names = frozenset(names)

    def __enter__(self) -> SafeArchive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, name: str) -> bytes:
        """Return the content of the member called `name`."""
        try:
            info = self._zip.getinfo(name)
        except KeyError as error:
            raise ReadError(f"the archive holds no {name!r}", code="corrupt") from error
        if info.flag_bits & 1:
            raise ReadError(f"{name!r} in the archive is encrypted", code="encrypted")
        if info.compress_type not in _METHODS:
            raise ReadError(f"{name!r} is compressed with method {info.compress_type}", code="unsupported")
        pieces, size = [], 0
        try:
            with self._zip.open(info) as member:
                while piece := member.read(_BLOCK):
                    size += len(piece)
                    self._read_bytes += len(piece)
                    self._check(name, size, info.compress_size)
                    pieces.append(piece)
        except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError) as error:
            raise ReadError(f"{name!r} in the archive is damaged: {error}", code="corrupt") from error
        return b"".join(pieces)

    def _check(self, name: str, size: int, packed: int) -> None:
        limits = self._limits
        if size > limits.max_member_bytes:
            raise _too_large(f"{name!r} unpacks to over {size} bytes", limits.max_member_bytes)
        if self._read_bytes > limits.max_archive_bytes:
            raise _too_large(f"the archive unpacks to over {self._read_bytes} bytes", limits.max_archive_bytes)
        if size > _RATIO_FROM and size > limits.max_ratio * max(packed, 1):
            raise _too_large(f"{name!r} unpacks to over {size // max(packed, 1)} times its size", limits.max_ratio)


def member_path(base: str, reference: str) -> str | None:
    """Return the member that a relative reference in member `base` means, None where it leaves the archive."""
    target = unquote(reference.partition("#")[0])
    if not target or "://" in target or target.startswith(("/", "\\")) or "\0" in target:
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(base), target))
    return None if path.startswith("..") else path


def _check_directory_size(path: Path, limits: ReadLimits) -> None:
    """Refuse an archive whose directory alone would be a burden: zipfile reads all of it at once."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _END_RECORD.size - _MAX_COMMENT))
        tail = file.read()
    place = tail.rfind(_END_MAGIC)
    if place < 0 or place + _END_RECORD.size > len(tail):
        raise ReadError("not readable as a zip archive: it has no directory, or is cut short", code="corrupt")
    *_, count, directory_bytes, _, _ = _END_RECORD.unpack_from(tail, place)
    # zip64 archives say 65,535 and 2^32 - 1 here; what lies before the end record then bounds the directory.
    directory_bytes = min(directory_bytes, start + place)
    if count > limits.max_members and count != 0xFFFF:
        raise _too_large(f"{count} files in the archive", limits.max_members)
    if directory_bytes > limits.max_members * _BYTES_A_MEMBER:
        raise _too_large(f"a directory of {directory_bytes} bytes", limits.max_members * _BYTES_A_MEMBER)


def _too_large(what: str, limit: int) -> ReadError:
    return ReadError(f"{what}, over the limit of {limit}", code="too_large")
