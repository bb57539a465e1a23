"""Objects behind URLs as sources: listed, recognised by what their store says of them, and fetched to be parsed.

An object is copied block by block to a private temporary file and then read like any file, in the parser process with
its limits. Unless the store says that it has changed since (entity tag, checksum, generation or time), it is not
fetched again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ragkit.credentials import public_url, safe_cause, without_credentials
from ragkit.errors import ReadError, StoreSpaceError, UsageError
from ragkit.readers.base import ParseContext
from ragkit.readers.file_systems import open_file_system, scheme_of
from ragkit.readers.globs import PathFilter
from ragkit.readers.origin import ReadLocal, Skipped, Source
from ragkit.readers.result import ReadResult

# What stores say of an object's content; the times only where they say nothing better.
_VERSIONS = ("etag", "md5hash", "content-md5", "content_md5", "digest", "checksum", "generation", "version_id")
_TIMES = ("mtime", "lastmodified", "last-modified", "last_modified", "updated", "modified", "created")
_SINGLE = frozenset({"http", "https", "data"})  # pages are not folders, although fsspec lists the links on them
_BLOCK = 1 << 20
_MAX_BYTES = 64 << 30
_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One object behind a URL. Plain data: it can be sent to other processes.

    Attributes:
        url: where its file system is, credentials and all; never stored or shown.
        path: the object in that file system.
    """

    url: str = field(repr=False)
    path: str

    def read(self, source: Source, context: ParseContext, read_local: ReadLocal) -> ReadResult:
        """Return what `read_local` makes of a copy; see `Origin`.

        Raises:
            ReadError: `unreadable` where it cannot be fetched, `changed` where it is being written to.
            StoreSpaceError: the disk is full.
        """
        for _ in range(_ATTEMPTS):
            with tempfile.NamedTemporaryFile(prefix="ragkit-fetch-") as spool:
                before = self._about(source.uri)
                size = self._fetch(source.uri, spool)
                result = read_local(replace(source, path=Path(spool.name), size=size, mtime_ns=0, origin=None))
            after = self._about(source.uri)
            if stamp_of(before) == stamp_of(after) and before.get("size") in (None, size):
                read = replace(source, size=size, mtime_ns=stamp_of(after))
                return replace(result, source=read)
        raise ReadError(f"{source.uri}: was changed {_ATTEMPTS} times while it was read", code="changed", stage="read")

    def _about(self, uri: str) -> Mapping[str, Any]:
        try:
            files, _ = open_file_system(self.url)
            files.invalidate_cache()
            about: Mapping[str, Any] = files.info(self.path)
        except Exception as error:  # every file system has errors of its own
            raise self._unreadable(uri, error) from safe_cause(error, self.url)
        return about

    def _fetch(self, uri: str, spool: IO[bytes]) -> int:
        """Copy the object and return its size in bytes."""
        size = 0
        try:
            files, _ = open_file_system(self.url)
            with files.open(self.path, "rb") as remote:
                while block := remote.read(_BLOCK):
                    size += len(block)
                    if size > _MAX_BYTES:
                        raise ReadError(f"{uri}: is larger than {_MAX_BYTES >> 30} GB", code="too_large", stage="read")
                    _write(spool, block, uri)
            spool.flush()
        except (ReadError, StoreSpaceError):
            raise
        except Exception as error:
            raise self._unreadable(uri, error) from safe_cause(error, self.url)
        return size

    def _unreadable(self, uri: str, error: Exception) -> ReadError:
        return ReadError(f"{uri}: {_reason(error, self.url)}", code="unreadable", stage="read")


def remote_sources(url: str, paths: PathFilter, on_skip: Callable[[Skipped], None]) -> Callable[[], Iterator[Source]]:
    """Return a function that yields the object at `url`, or those below it, by name.

    Raises:
        UsageError: there is nothing, or it cannot be looked at; raised here, before anything is yielded.
    """
    name = public_url(url)
    files, root = open_file_system(url)
    try:
        files.invalidate_cache()
        about = files.info(root)
    except Exception as error:
        raise UsageError(f"cannot read {name!r}: {_reason(error, url)}") from safe_cause(error, url)
    if about.get("type") != "directory" or scheme_of(url) in _SINGLE:
        source = Source(name, Path(), int(about.get("size") or 0), stamp_of(about), origin=RemoteFile(url, root))
        return lambda: iter((source,))
    return lambda: _below(url, root, files, paths, on_skip)


def stamp_of(about: Mapping[str, Any]) -> int:
    """Return a number that changes with the object's content, by what its store says; 0 where it says nothing."""
    folded = {key.casefold(): value for key, value in about.items()}
    for names in (_VERSIONS, _TIMES):
        said = {name: _text(folded[name]) for name in names if folded.get(name)}
        if said:
            digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()
            return int.from_bytes(digest[:7])  # fits SQLite's integers, and never by chance 0
    return 0


def _text(value: object) -> str:
    """Return what a store said as text; some give a time as a number in lists and as an object for one file."""
    if isinstance(value, datetime):
        value = value.timestamp()
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _below(url: str, root: str, files: Any, paths: PathFilter, on_skip: Callable[[Skipped], None]) -> Iterator[Source]:
    base = public_url(url.partition("?")[0]).rstrip("/")
    try:
        found = files.find(root, detail=True)
    except Exception as error:
        on_skip(Skipped(base, f"cannot be listed: {_reason(error, url)}"))
        return
    for path in sorted(found, key=lambda path: PurePosixPath(path).parts):
        relative = str(path)[len(root) :].strip("/")
        folders = [str(folder) for folder in PurePosixPath(relative).parents][:-1]
        if relative and paths.takes_file(relative) and all(paths.takes_folder(folder) for folder in folders):
            about = found[path]
            size = int(about.get("size") or 0)
            origin = RemoteFile(url, str(path))
            yield Source(f"{base}/{relative}", Path(), size, stamp_of(about), named=False, origin=origin)


def _write(spool: IO[bytes], block: bytes, uri: str) -> None:
    try:
        spool.write(block)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreSpaceError(
                f"{uri} could not be copied to {tempfile.gettempdir()}: {error.strerror}; make room there, or name "
                "another folder in TMPDIR"
            ) from error
        raise


def _reason(error: Exception, url: str) -> str:
    """Return what went wrong in one line, without credentials."""
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__  # over HTTP every failure ends as a missing file
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410):
            return "there is nothing"
        return without_credentials(str(cause) or type(cause).__name__, url)
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return without_credentials(text, url)
