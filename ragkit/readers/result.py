"""What reading one source gives, with the documents on disk where they are many."""

from __future__ import annotations

import json
import tempfile
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, overload

from ragkit.errors import ReadError
from ragkit.readers.base import FailedRow, ParsedDocument
from ragkit.readers.media_type import MediaType
from ragkit.readers.origin import Source
from ragkit.types import Document, PageSpan

_MAX_FAILED_ROWS = 1000
_SPILL_CHARS = 32 << 20


@dataclass(frozen=True, slots=True)
class ReadResult:
    """The documents of one source.

    Attributes:
        source: the file as it was when it was read.
        media_type: what the content turned out to be.
        reader: name and version of the reader, such as `pdf/1`.
        content_sha256: of the file's bytes.
        documents: at least one; more for tables. A sequence that may lie on disk, read again on each pass.
        warnings: one line each.
        failed_rows: the first 1,000 rows of a table that gave no document.
        failed_row_count: all of them.
    """

    source: Source
    media_type: MediaType
    reader: str
    content_sha256: str
    documents: Sequence[Document]
    warnings: tuple[str, ...] = ()
    failed_rows: tuple[FailedRow, ...] = ()
    failed_row_count: int = 0


@dataclass(frozen=True, slots=True)
class ReadFailure:
    """A source that gave no documents, and why."""

    source: Source
    error: ReadError


class SpilledDocuments(Sequence[Document]):
    """A sequence of documents that goes to a nameless temporary file once it holds over 32 million characters."""

    def __init__(self, uri: str, spill_chars: int = _SPILL_CHARS) -> None:
        self._uri = uri
        self._spill_chars = spill_chars
        self._held: list[Document] = []
        self._held_chars = 0
        self._file: IO[bytes] | None = None
        self._offsets = array("Q")
        self._reading = threading.Lock()

    def add(self, parsed: ParsedDocument) -> None:
        """Append one document; rows of a table are named by their key as `#id=KEY`, else by number as `#row=N`."""
        uri = self._uri if parsed.row is None else f"{self._uri}#row={parsed.row}"
        if parsed.key:
            uri = f"{self._uri}#id={parsed.key}"
        self.append(Document.from_text(parsed.text, uri, parsed.pages, parsed.metadata))

    def append(self, document: Document) -> None:
        """Append one document as it is."""
        if self._file is None:
            self._held.append(document)
            self._held_chars += len(document.text)
            if self._held_chars > self._spill_chars and len(self._held) > 1:
                self._file = tempfile.TemporaryFile(prefix="ragkit-rows-")  # noqa: SIM115 - lives as long as the sequence
                for held in self._held:
                    self._write(self._file, held)
                self._held = []
        else:
            self._write(self._file, document)

    def __len__(self) -> int:
        return len(self._offsets) or len(self._held)

    def __iter__(self) -> Iterator[Document]:
        for index in range(len(self)):
            yield self[index]

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        """Return one document, or those of a slice as a list."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if self._file is None:
            return self._held[index]
        place = range(len(self))[index]
        with self._reading:
            self._file.seek(self._offsets[place])
            head = json.loads(self._file.readline())
            text = self._file.read(head["bytes"]).decode("utf-8")
        pages = tuple(PageSpan(*page) for page in head["pages"])
        return Document(head["doc_id"], head["uri"], text, pages, head["metadata"])

    def _write(self, file: IO[bytes], document: Document) -> None:
        raw = document.text.encode("utf-8")
        pages = [(page.number, page.char_start, page.char_stop) for page in document.pages]
        head = {
            "doc_id": document.doc_id,
            "uri": document.uri,
            "bytes": len(raw),
            "pages": pages,
            "metadata": dict(document.metadata),
        }
        self._offsets.append(file.seek(0, 2))
        file.write(json.dumps(head).encode("ascii") + b"\n" + raw)


class Collected:
    """Collects what a reader yields, within the limits of one source."""

    def __init__(self, uri: str, max_total_bytes: int, max_documents: int) -> None:
        self.documents = SpilledDocuments(uri)
        self.warnings: dict[str, None] = {}
        self.failed_rows: list[FailedRow] = []
        self.failed_row_count = 0
        self._bytes_left = max_total_bytes
        self._max_documents = max_documents

    def add(self, parsed: ParsedDocument) -> None:
        """Take one document."""
        self._bytes_left -= len(parsed.text)
        if self._bytes_left < 0 or len(self.documents) >= self._max_documents:
            raise ReadError(
                f"more than {len(self.documents)} documents or too much text for one source", code="too_large"
            )
        self.documents.add(parsed)
        prefix = "" if parsed.row is None else f"row {parsed.row}: "
        for warning in parsed.warnings:
            self.warn(prefix + warning)

    def fail(self, row: FailedRow) -> None:
        """Take note of a row that gave no document."""
        self.failed_row_count += 1
        if len(self.failed_rows) < _MAX_FAILED_ROWS:
            self.failed_rows.append(row)

    def warn(self, message: str) -> None:
        """Take note of a warning, up to as many as one can read."""
        if len(self.warnings) < 100:
            self.warnings[message] = None
