"""What a file is, told from its bytes. Names only break ties among text formats."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import PurePath

from ragkit.readers.encodings import head_text, looks_binary

HEAD_BYTES = 64 * 1024
_TAIL_BYTES = 64 * 1024


class MediaType(StrEnum):
    """The formats that are told apart. Those without a reader are refused by name."""

    TEXT = "text/plain"
    MARKDOWN = "text/markdown"
    HTML = "text/html"
    CSV = "text/csv"
    JSONL = "application/jsonl"
    PDF = "application/pdf"
    DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    EPUB = "application/epub+zip"
    PARQUET = "application/vnd.apache.parquet"
    ROWS = "application/x-sql-rows"  # of a database
    GIVEN = "application/x-document"  # handed over by the caller
    OLE = "application/x-ole-storage"
    ZIP = "application/zip"
    IMAGE = "image/*"
    BINARY = "application/octet-stream"


_MAGIC: tuple[tuple[bytes, MediaType], ...] = (
    (b"PAR1", MediaType.PARQUET),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", MediaType.OLE),
    (b"\x89PNG\r\n\x1a\n", MediaType.IMAGE),
    (b"\xff\xd8\xff", MediaType.IMAGE),
    (b"GIF87a", MediaType.IMAGE),
    (b"GIF89a", MediaType.IMAGE),
    (b"II*\0", MediaType.IMAGE),
    (b"MM\0*", MediaType.IMAGE),
    (b"\x7fELF", MediaType.BINARY),
    (b"\x1f\x8b", MediaType.BINARY),
    (b"BZh", MediaType.BINARY),
    (b"\xfd7zXZ\0", MediaType.BINARY),
    (b"\x28\xb5\x2f\xfd", MediaType.BINARY),
    (b"7z\xbc\xaf\x27\x1c", MediaType.BINARY),
    (b"Rar!\x1a\x07", MediaType.BINARY),
    (b"SQLite format 3\0", MediaType.BINARY),
    (b"{\\rtf", MediaType.BINARY),
    (b"%!PS", MediaType.BINARY),
)
_TEXT_SUFFIXES = {
    ".md": MediaType.MARKDOWN,
    ".markdown": MediaType.MARKDOWN,
    ".mdown": MediaType.MARKDOWN,
    ".html": MediaType.HTML,
    ".htm": MediaType.HTML,
    ".xhtml": MediaType.HTML,
    ".csv": MediaType.CSV,
    ".tsv": MediaType.CSV,
    ".jsonl": MediaType.JSONL,
    ".ndjson": MediaType.JSONL,
}
_ZIP_SUFFIXES = {".docx": MediaType.DOCX, ".epub": MediaType.EPUB}
# Atomic and possessive: a thousand comments could otherwise be paired in exponentially many ways.
_PREAMBLE = r"(?>\s+|<\?xml[^>]{0,200}\?>|<!--.*?-->)*+"
_HTML_START = re.compile(_PREAMBLE + r"(?:<!doctype\s+html\b|<html[\s>]|<head[\s>]|<body[\s>])", re.I | re.S)
_SVG_START = re.compile(_PREAMBLE + r"(?:<!doctype\s+svg\b[^>]{0,400}>\s*)?<svg[\s>]", re.I | re.S)
_JSON_LINE = re.compile(r"\s*\{.*\}\s*", re.S)


def sniff(head: bytes, name: str = "") -> MediaType:
    """Return what `head`, the first bytes of a file called `name`, belong to.

    The content decides. The name only chooses among text formats, and between kinds of zip archive where the head
    does not show what is inside. `BINARY`, `IMAGE`, `ZIP` and `OLE` have no reader.
    """
    suffix = PurePath(name).suffix.lower()
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _sniff_zip(head, suffix)
    for magic, media_type in _MAGIC:
        if head.startswith(magic):
            return media_type
    if head[:4] == b"RIFF" or head[4:8] == b"ftyp":
        return MediaType.BINARY
    if _is_pdf(head, suffix):
        return MediaType.PDF
    if looks_binary(head):
        return MediaType.BINARY
    return _sniff_text(head_text(head), suffix)


def sniff_file(descriptor: int, size: int, name: str) -> MediaType:
    """Return the media type of an open file; a zip archive is also looked up in its directory at the end."""
    media_type = sniff(os.pread(descriptor, HEAD_BYTES, 0), name)
    if media_type is MediaType.ZIP:
        tail = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        return _sniff_zip(tail, PurePath(name).suffix.lower())
    return media_type


def _is_pdf(head: bytes, suffix: str) -> bool:
    """Return whether the header stands at the start, or within 1,024 bytes of a file that is no text about PDF."""
    if head.lstrip(b"\xef\xbb\xbf \t\r\n\0").startswith(b"%PDF-"):
        return True
    place = head[:1024].find(b"%PDF-")
    return place > 0 and (suffix == ".pdf" or looks_binary(head[:place]))


def _sniff_zip(data: bytes, suffix: str) -> MediaType:
    if b"mimetypeapplication/epub+zip" in data or b"META-INF/container.xml" in data:
        return MediaType.EPUB
    if b"word/document.xml" in data or b"word/_rels/" in data:
        return MediaType.DOCX
    if any(mark in data for mark in (b"xl/workbook", b"ppt/presentation", b"content.xmlPK")):
        return MediaType.BINARY
    if b"[Content_Types].xml" in data:
        return _ZIP_SUFFIXES.get(suffix, MediaType.ZIP)
    return MediaType.ZIP


def _sniff_text(text: str, suffix: str) -> MediaType:
    if _HTML_START.match(text):
        return MediaType.HTML
    if _SVG_START.match(text):
        return MediaType.IMAGE
    by_name = _TEXT_SUFFIXES.get(suffix)
    if by_name is not None:
        return by_name
    return MediaType.JSONL if not suffix and _looks_like_jsonl(text) else MediaType.TEXT


def _looks_like_jsonl(text: str) -> bool:
    """Return whether the first two whole lines are JSON objects; asked only of a source without a suffix."""
    lines = text.split("\n", 2)
    return len(lines) == 3 and all(_JSON_LINE.fullmatch(line) for line in lines[:2])
