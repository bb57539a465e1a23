"""Reads one source: sniffs it, hands it to its reader, and makes sure that it did not change meanwhile."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ragkit.config import IngestConfig
from ragkit.errors import ReadError, UsageError
from ragkit.readers.base import FailedRow, ParseContext, Parsed, ParsedDocument, Reader, ReadLimits
from ragkit.readers.invisible import is_blank
from ragkit.readers.media_type import MediaType, sniff_file
from ragkit.readers.origin import Source
from ragkit.readers.process import ParserProcess
from ragkit.readers.registry import READERS, load_reader
from ragkit.readers.result import Collected, ReadResult
from ragkit.readers.source import discover
from ragkit.readers.text import TextReader
from ragkit.types import Document

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
_BLOCK = 1 << 20
_FRESH_NS = 2_000_000_000  # file systems keep times in steps of up to 2 s: within one, a change may not show
_ENCRYPTED_OFFICE = "EncryptedPackage".encode("utf-16-le")
_WHY_NOT = {
    MediaType.IMAGE: "is a picture; run OCR on it first",
    MediaType.ZIP: "is a zip archive of no known document format; unpack it",
    MediaType.OLE: "is in a binary Office format of before 2007; save it as DOCX or PDF",
    MediaType.BINARY: "is binary data of no known document format",
}
_local = threading.local()


class _ChangedError(Exception):
    """The file was written to while it was read."""


def read_source(
    source: Source,
    limits: ReadLimits | None = None,
    *,
    text_column: str | None = None,
    process: ParserProcess | None = None,
) -> ReadResult:
    """Return the documents of one source, all of them valid and none blank.

    Args:
        source: from `discover`.
        limits: what it may cost.
        text_column: the column that holds the text of table rows; found by its name where not given.
        process: the parser process to use; by default one that the calling thread keeps.

    Raises:
        ReadError: its `code` and `stage` say why there are none.
    """
    context = ParseContext(limits or ReadLimits(), text_column)
    if source.origin is not None:
        return source.origin.read(source, context, lambda local: _read_local(local, context, process))
    return _read_local(source, context, process)


def _read_local(source: Source, context: ParseContext, process: ParserProcess | None) -> ReadResult:
    for _ in range(_ATTEMPTS):
        try:
            return _read_once(source, context, process)
        except _ChangedError:
            continue
        except OSError as error:
            raise ReadError(f"{source.uri}: {error.strerror or error}", code="unreadable", stage="read") from error
    raise ReadError(f"{source.uri}: was changed {_ATTEMPTS} times while it was read", code="changed", stage="read")


def read_documents(path: str | Path, config: IngestConfig | None = None) -> Sequence[Document]:
    """Return the documents of one file, under the limits of `config`; what was lost or replaced is logged.

    Raises:
        UsageError: there is no such file, or it is a folder.
        ReadError: as `read_source`.
    """
    config = config or IngestConfig()
    if os.fspath(path) != "-" and os.path.isdir(path):
        raise UsageError(f"{os.fspath(path)!r} is a folder; give one file")
    limits = ReadLimits(timeout_s=config.parse_timeout_s, memory_mb=config.parse_memory_mb)
    result = read_source(next(discover([path])), limits)
    for warning in result.warnings:
        logger.warning("%s: %s", result.source.uri, warning)
    if result.failed_row_count:
        first = result.failed_rows[0]
        logger.warning(
            "%s: %d rows gave no document; the first, %d: %s",
            result.source.uri,
            result.failed_row_count,
            first.row,
            first.message,
        )
    return result.documents


def _read_once(source: Source, context: ParseContext, process: ParserProcess | None) -> ReadResult:
    descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ReadError(f"{source.uri}: is no regular file any more", code="unreadable", stage="read")
        source = replace(source, size=before.st_size, mtime_ns=before.st_mtime_ns)
        try:
            result = _read_open(descriptor, source, context, process)
        except ReadError as error:
            _refuse_changed(descriptor, source, before, None)
            raise _located(source, error) from error
        _refuse_changed(descriptor, source, before, result.content_sha256)
        return result
    finally:
        os.close(descriptor)


def _read_open(descriptor: int, source: Source, context: ParseContext, process: ParserProcess | None) -> ReadResult:
    if source.size == 0:
        raise ReadError("the file is empty", code="empty", stage="read")
    media_type = sniff_file(descriptor, source.size, source.name)
    reader = _reader_for(media_type, descriptor, source.size)
    items: Generator[Parsed]
    if READERS[media_type].in_process and isinstance(reader, TextReader):
        data = _content(descriptor, source.size, context.limits.max_text_bytes)
        digest = hashlib.sha256(data).hexdigest()
        items = (parsed for parsed in (reader.parse(data),))
        del data
    else:
        digest = _hashed(descriptor)
        items = (process or _own_process()).parse(source.path, media_type, context)
    collected = _collect(source, items, context.limits)
    if not len(collected.documents):
        raise _nothing_read(collected)
    return ReadResult(
        source,
        media_type,
        f"{reader.name}/{reader.version}",
        digest,
        collected.documents,
        tuple(collected.warnings),
        tuple(collected.failed_rows),
        collected.failed_row_count,
    )


def _reader_for(media_type: MediaType, descriptor: int, size: int) -> Reader:
    if media_type in READERS:
        return load_reader(media_type)
    if media_type is MediaType.OLE and _holds(descriptor, size, _ENCRYPTED_OFFICE):
        raise ReadError("needs a password; save a copy without one", code="encrypted", stage="read")
    raise ReadError(_WHY_NOT.get(media_type, f"has no reader: {media_type}"), code="unsupported", stage="read")


def _collect(source: Source, items: Generator[Parsed], limits: ReadLimits) -> Collected:
    collected = Collected(source.uri, limits.max_total_bytes, limits.max_documents)
    with closing(items):
        for item in items:
            if isinstance(item, ParsedDocument):
                if not is_blank(item.text):
                    collected.add(item)
            elif isinstance(item, FailedRow):
                collected.fail(item)
            else:
                collected.warn(item.message)
    return collected


def _nothing_read(collected: Collected) -> ReadError:
    if collected.failed_rows:
        first = collected.failed_rows[0]
        return ReadError(
            f"none of {collected.failed_row_count} rows could be read; row {first.row}: {first.message}",
            code=first.code,
        )
    return ReadError("; ".join(("there is no text in it", *collected.warnings)), code="empty")


def _located(source: Source, error: ReadError) -> ReadError:
    return ReadError(f"{source.uri}: {error}", code=error.code, stage=error.stage)


def _content(descriptor: int, size: int, limit: int) -> bytearray:
    """Return the bytes of a file of `size`, which were counted before and may not be more than `limit`."""
    if size > limit:
        raise ReadError(f"{size} bytes of text are over the limit of {limit}", code="too_large", stage="read")
    data, have = bytearray(size), 0
    view = memoryview(data)
    while have < size:
        count = os.preadv(descriptor, [view[have : have + _BLOCK]], have)
        if not count:
            raise _ChangedError
        have += count
    return data


def _hashed(descriptor: int) -> str:
    digest, place = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK, place):
        digest.update(block)
        place += len(block)
    return digest.hexdigest()


def _holds(descriptor: int, size: int, mark: bytes) -> bool:
    """Return whether `mark` stands in the first 16 MB, where an Office file keeps its directory."""
    overlap, place = b"", 0
    while place < min(size, 16 * _BLOCK):
        block = os.pread(descriptor, _BLOCK, place)
        if mark in overlap + block:
            return True
        overlap, place = block[-len(mark) :], place + _BLOCK
    return False


def _refuse_changed(descriptor: int, source: Source, before: os.stat_result, digest: str | None) -> None:
    """Raise `_ChangedError` where the path now means another file, or the same one with other content."""
    if digest is not None and time.time_ns() - before.st_mtime_ns < _FRESH_NS and _hashed(descriptor) != digest:
        raise _ChangedError
    try:
        now = os.stat(source.path, follow_symlinks=False)
    except OSError as error:
        raise _ChangedError from error
    if _identity(now) != _identity(before) or _identity(os.fstat(descriptor)) != _identity(before):
        raise _ChangedError


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _own_process() -> ParserProcess:
    """Return the parser process of the calling thread; it ends with the thread."""
    process: ParserProcess | None = getattr(_local, "process", None)
    if process is None:
        process = _local.process = ParserProcess()
    return process
