"""Finds what is to be read: files, folders, URLs, databases, documents that the caller gives, and standard input."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ragkit.errors import ReadError, UsageError
from ragkit.readers.file_systems import is_url, scheme_of
from ragkit.readers.given import given_sources
from ragkit.readers.globs import PathFilter
from ragkit.readers.origin import Skipped, Source
from ragkit.readers.remote_file import remote_sources
from ragkit.readers.sql import is_sql_url, sql_sources
from ragkit.types import Document

logger = logging.getLogger(__name__)

# Litter that no one means when naming a folder. Hidden files are left out by `PathFilter`.
DEFAULT_EXCLUDE = (
    "__pycache__/",
    "node_modules/",
    "*.pyc",
    "*~",
    "*.swp",
    "#*#",
    "~$*",
    "*.part",
    "*.crdownload",
    "Thumbs.db",
    "desktop.ini",
)
_BLOCK = 1 << 20


#: What `discover` takes: a path, a URL, `-`, or documents.
Findable = str | Path | Document | Iterable[Document]
Finder = Callable[[], Iterator[Source]]


def discover(
    sources: Sequence[Findable],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    on_skip: Callable[[Skipped], None] | None = None,
    on_fail: Callable[[str, ReadError], None] | None = None,
) -> Iterator[Source]:
    """Yield the sources that `sources` name, each once, in the order given and by name within folders.

    Args:
        sources: files, folders (looked into at every depth), URLs of files and folders (`file://`, and what fsspec
            knows), URLs of databases with a `query`, documents, or `-` for standard input.
        include: glob patterns; only matching files of folders are taken (`PathFilter`).
        exclude: glob patterns; matching files and folders are left out.
        on_skip: called with each link that leaves its folder, each special file and each unreadable folder.
        on_fail: called with a name and the error where an iterable of documents fails; what it gave before is yielded.
            The error is raised where this is left out.

    Raises:
        UsageError: a source does not exist or is no file or folder; raised before the first one is yielded.
    """
    walk = _Walk(PathFilter(include, (*DEFAULT_EXCLUDE, *exclude)), on_skip)
    return _unique([_finder(source, walk, on_fail) for source in sources])


def content_sha256(source: Source) -> str:
    """Return the hex SHA-256 of the bytes of `source`, a local file.

    Raises:
        ReadError: `unreadable`.
    """
    try:
        with source.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ReadError(f"{source.uri}: {error.strerror or error}", code="unreadable", stage="read") from error


def uri_of(path: str | Path) -> str:
    """Return the text form of an absolute path; bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _finder(source: Findable, walk: _Walk, on_fail: Callable[[str, ReadError], None] | None) -> Finder:
    """Return what yields the sources of one argument; what is wrong with the argument is raised here."""
    if isinstance(source, Document):
        source = (source,)
    if not isinstance(source, str | os.PathLike):
        return partial(given_sources, source, walk.skip, on_fail)
    text = os.fspath(source)
    if text == "-":
        return lambda: iter((_standard_input(),))
    if is_url(text) and not os.path.exists(text):
        if is_sql_url(text):
            return sql_sources(text)
        if scheme_of(text) != "file":
            return remote_sources(text, walk.paths, walk.skip)
    path = _checked(text)
    if path.is_dir():
        return partial(walk.folder, path)
    status = path.stat()
    found = Source(uri_of(path), Path(os.path.realpath(path)), status.st_size, status.st_mtime_ns)
    return lambda: iter((found,))


def _checked(text: str) -> Path:
    """Return the absolute path of the file or folder that `text` names."""
    path = Path(os.path.abspath(_local_path(text)))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot read {text!r}: {reason}; give a file, a folder, or - for standard input") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UsageError(f"{text!r} is neither a file nor a folder; to read from a pipe, give - and pipe into it")
    return path


def _local_path(text: str) -> str:
    if not text:
        raise UsageError("a source is empty; give a file, a folder, or - for standard input")
    if not is_url(text) or os.path.exists(text):
        return text
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"cannot read {text!r}: a file URL must name this machine, got host {parts.netloc!r}")
    return unquote(parts.path)


def _unique(finders: Sequence[Finder]) -> Iterator[Source]:
    seen: set[str] = set()
    for find in finders:
        for source in find():
            if source.uri not in seen:
                seen.add(source.uri)
                yield source


class _Walk:
    """Walks folders without leaving them: the files of a folder by name, then its folders by name."""

    def __init__(self, paths: PathFilter, on_skip: Callable[[Skipped], None] | None) -> None:
        self.paths = paths
        self._on_skip = on_skip

    def folder(self, root: Path) -> Iterator[Source]:
        real_root = os.path.realpath(root)
        stack = [(str(root), "")]
        while stack:
            folder, relative = stack.pop()
            deeper: list[tuple[str, str]] = []
            for entry in self._entries(folder):
                found = self._entry(entry, f"{relative}/{entry.name}" if relative else entry.name, real_root)
                if isinstance(found, Source):
                    yield found
                elif found is not None:
                    deeper.append(found)
            stack.extend(reversed(deeper))

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._left_out(folder, f"cannot be listed: {error.strerror}")
            return []

    def _entry(self, entry: os.DirEntry[str], relative: str, real_root: str) -> tuple[str, str] | Source | None:
        """Return a source, a folder to look into, or None for what is left out."""
        try:
            if entry.is_dir(follow_symlinks=False):
                return (entry.path, relative) if self.paths.takes_folder(relative) else None
            if not self.paths.takes_file(relative):
                return None
            target = entry.path
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not self._link_stays(entry.path, target, real_root):
                    return None
            status = os.stat(target, follow_symlinks=False)
        except OSError as error:
            self._left_out(entry.path, f"cannot be examined: {error.strerror}")
            return None
        if not stat.S_ISREG(status.st_mode):
            self._left_out(entry.path, "is no regular file")
            return None
        return Source(uri_of(entry.path), Path(target), status.st_size, status.st_mtime_ns, named=False)

    def _link_stays(self, link: str, target: str, real_root: str) -> bool:
        """Return whether a link leads to a file below the root. A folder below the root is met where it stands."""
        if os.path.commonpath((target, real_root)) != real_root:
            self._left_out(link, "is a symbolic link out of the folder")
            return False
        return not os.path.isdir(target)

    def _left_out(self, path: str, reason: str) -> None:
        self.skip(Skipped(uri_of(path), reason))

    def skip(self, skipped: Skipped) -> None:
        """Say that something is not taken."""
        logger.warning("skipped %s: %s", skipped.uri, skipped.reason)
        if self._on_skip is not None:
            self._on_skip(skipped)


@lru_cache(maxsize=1)
def _spool_folder() -> tempfile.TemporaryDirectory[str]:
    """Return the private folder that holds standard input until the process ends."""
    return tempfile.TemporaryDirectory(prefix="ragkit-stdin-")


def _standard_input() -> Source:
    """Return standard input, copied to a private file, under a name that its content gives it."""
    digest = hashlib.sha256()
    descriptor, name = tempfile.mkstemp(dir=_spool_folder().name)
    with os.fdopen(descriptor, "wb") as spool:
        while block := sys.stdin.buffer.read(_BLOCK):
            digest.update(block)
            spool.write(block)
    status = os.stat(name)
    return Source(f"stdin:{digest.hexdigest()[:16]}", Path(name), status.st_size, status.st_mtime_ns)
