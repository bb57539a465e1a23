"""The reader contract: a reader turns one file into parsed documents and knows nothing of stores or processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ragkit.errors import ConfigError
from ragkit.readers.media_type import MediaType
from ragkit.types import Metadata, PageSpan

MB = 1 << 20


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """What one source may cost. Beyond it the source fails with `timeout`, `oom` or `too_large`.

    Attributes:
        timeout_s: wall clock for one document; in tables of documents, between two documents.
        memory_mb: address space of the parser process.
        max_text_bytes: UTF-8 bytes of one document's text.
        max_total_bytes: UTF-8 bytes of all documents of one source.
        max_documents: documents of one source.
        max_members: files in a zip archive.
        max_member_bytes: one file of an archive, uncompressed.
        max_archive_bytes: everything read from one archive, uncompressed.
        max_ratio: uncompressed to compressed size of one file of an archive, from 1 MB on.
    """

    timeout_s: float = 120.0
    memory_mb: int = 2048
    max_text_bytes: int = 512 * MB
    max_total_bytes: int = 4096 * MB
    max_documents: int = 10_000_000
    max_members: int = 10_000
    max_member_bytes: int = 256 * MB
    max_archive_bytes: int = 1024 * MB
    max_ratio: int = 200

    def __post_init__(self) -> None:
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ConfigError(f"timeout_s must be a finite number > 0, got {self.timeout_s}")
        for name in _WHOLE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")


_WHOLE = (
    "memory_mb",
    "max_text_bytes",
    "max_total_bytes",
    "max_documents",
    "max_members",
    "max_member_bytes",
    "max_archive_bytes",
    "max_ratio",
)


@dataclass(frozen=True, slots=True)
class ParseContext:
    """What a reader is told beside the path: limits, and the column that holds the text of table rows, if given."""

    limits: ReadLimits = field(default_factory=ReadLimits)
    text_column: str | None = None


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """Text and facts as parsed, before it has an identity.

    Attributes:
        text: the text; valid Unicode, no NUL.
        pages: page spans in ascending order.
        metadata: flat values.
        row: 1-based row of a table of documents, None for a file that is one document.
        warnings: one line each.
        key: what names a row of a database for good, empty where only its number does.
    """

    text: str
    pages: tuple[PageSpan, ...] = ()
    metadata: Metadata = field(default_factory=dict)
    row: int | None = None
    warnings: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True, slots=True)
class FailedRow:
    """One row of a table that gave no document, while the others did."""

    row: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Remark:
    """One line to be said about a file as a whole."""

    message: str


Parsed = ParsedDocument | FailedRow | Remark


class Reader(Protocol):
    """Reads the files of some media types.

    `version` goes up whenever the same bytes give another text, so that stores know what to read again.
    """

    @property
    def name(self) -> str:
        """Short name, such as `pdf`."""
        ...

    @property
    def version(self) -> int:
        """Counts changes of the output."""
        ...

    @property
    def media_types(self) -> frozenset[MediaType]:
        """What it reads."""
        ...

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        """Yield the documents of the file at `path`, in order, without holding more than a few at once.

        Raises:
            ReadError: the file cannot be read; `code` says why.
        """
        ...
