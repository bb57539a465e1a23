"""A source, and where its content comes from when it is no local file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from ragkit.readers.base import ParseContext
    from ragkit.readers.result import ReadResult


@dataclass(frozen=True, slots=True)
class Source:
    """Something that can be read and gives documents.

    Attributes:
        uri: absolute path as text, symbolic links kept; `stdin:` and 16 hex digits of the content for standard input;
            a URL without credentials for what lies elsewhere.
        path: where the bytes are, symbolic links followed; meaningless with an `origin`.
        size: bytes; 0 where it is not known yet.
        mtime_ns: time of the last change; with an `origin` a number that changes with the content, 0 for unknown.
        named: given by the caller, rather than found in a folder.
        origin: what gets the content; None for local files.
    """

    uri: str
    path: Path
    size: int
    mtime_ns: int
    named: bool = True
    origin: Origin | None = None

    @property
    def name(self) -> str:
        """The last part of the URI's path, whose suffix may say what it is."""
        return PurePath(urlsplit(self.uri).path if "://" in self.uri else self.uri).name


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something in a folder that was not taken, and why."""

    uri: str
    reason: str


ReadLocal = Callable[[Source], "ReadResult"]


class Origin(Protocol):
    """Gets the content of one source. Can be pickled, so that workers can read it."""

    def read(self, source: Source, context: ParseContext, read_local: ReadLocal) -> ReadResult:
        """Return the documents of `source`; its `source` has the size and the number that belong to them.

        Args:
            source: the source whose origin this is.
            context: the limits, and the column that holds the text of rows.
            read_local: reads a local file within the limits.

        Raises:
            ReadError: it cannot be read; its message begins with the URI.
        """
        ...
