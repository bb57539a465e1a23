"""The one table that says which reader reads what. A new reader is one file and one line here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import cast

from ragkit.errors import ReadError
from ragkit.readers.base import Reader
from ragkit.readers.media_type import MediaType


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a reader class stands, and whether it is trusted to run outside of the parser process."""

    module: str
    class_name: str
    in_process: bool = False


READERS: dict[MediaType, Entry] = {
    MediaType.TEXT: Entry("ragkit.readers.text", "TextReader", in_process=True),
    MediaType.MARKDOWN: Entry("ragkit.readers.text", "MarkdownReader", in_process=True),
    MediaType.HTML: Entry("ragkit.readers.html", "HtmlReader"),
    MediaType.PDF: Entry("ragkit.readers.pdf", "PdfReader"),
    MediaType.DOCX: Entry("ragkit.readers.docx", "DocxReader"),
    MediaType.EPUB: Entry("ragkit.readers.epub", "EpubReader"),
    MediaType.CSV: Entry("ragkit.readers.csv", "CsvReader"),
    MediaType.JSONL: Entry("ragkit.readers.jsonl", "JsonlReader"),
    MediaType.PARQUET: Entry("ragkit.readers.parquet", "ParquetReader"),
}


def load_reader(media_type: MediaType) -> Reader:
    """Return the reader of `media_type`; its parser library is imported when it first reads.

    Raises:
        ReadError: `unsupported`, where there is none.
    """
    entry = READERS.get(media_type)
    if entry is None:
        raise ReadError(
            f"no reader for {media_type.value}; readable are {', '.join(sorted(READERS))}", code="unsupported"
        )
    return cast(Reader, getattr(import_module(entry.module), entry.class_name)())
