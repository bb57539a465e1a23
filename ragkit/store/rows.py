"""Rows of the catalogue: their checksums, and how text and metadata become SQLite values and back."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ragkit.errors import StoreCorruptError, UsageError
from ragkit.types import Metadata, MetadataValue, PageSpan

Bits = bytes  # `SegmentRow.bytes` hides the builtin's name within that class
LONGEST_FILTER_VALUE = 256


def row_crc(*values: object) -> int:
    """Return the CRC-32 of plain Python values (str, int, None, bytes).

    `ascii` is the encoding: unlike `repr` it does not depend on the Unicode version of the interpreter.
    """
    return zlib.crc32(ascii(values).encode("ascii"))


def chunk_crc(row_id: int, facts: tuple[object, ...], text: bytes) -> int:
    """Return the CRC-32 of a chunk row: its text, and the facts that say where it belongs, its metadata last.

    Without metadata they do not count, so that the rows of formats 1 and 2, which had none, keep their checksums.
    """
    return zlib.crc32(text, row_crc(row_id, *(facts if facts[-1] else facts[:-1])))


def to_sql(text: str) -> str | bytes:
    """Return `text` as SQLite stores it: TEXT, or a BLOB where lone surrogates have no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def from_sql(value: str | bytes) -> str:
    """Return the text that `to_sql` stored."""
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value


def checked(table: str, name: object, stored_crc: object, actual_crc: int) -> None:
    """Raise `StoreCorruptError` where a row's checksum is not that of its values."""
    if stored_crc != actual_crc:
        raise StoreCorruptError(
            f"stored bytes are damaged: {table} row {name} does not match its checksum; "
            "run `ragkit verify` to see what is affected and `ragkit verify --repair` to mark it for reading again"
        )


def metadata_to_json(uri: str, metadata: Metadata) -> str:
    """Return metadata as JSON, in ASCII.

    Raises:
        UsageError: a value is not flat.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not (value is None or isinstance(value, (str, int, float, bool))):
            raise UsageError(
                f"{uri}: metadata {key!r} has a value of type {type(value).__name__}; "
                "give text, a number, true/false or nothing"
            )
    return json.dumps(dict(metadata))


def pages_to_json(pages: tuple[PageSpan, ...]) -> str:
    """Return page spans as JSON."""
    return json.dumps([(page.number, page.char_start, page.char_stop) for page in pages])


def pages_from_json(text: str) -> tuple[PageSpan, ...]:
    """Return the page spans that `pages_to_json` wrote."""
    return tuple(PageSpan(*page) for page in json.loads(text))


def filter_text(value: MetadataValue) -> str:
    """Return the text by which filters compare a metadata value: 2020, 2020.0 and "2020" are the same."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    if len(text) > LONGEST_FILTER_VALUE:
        # Long texts are compared by digest: an index over whole paragraphs would double the catalogue.
        return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return text


def filter_rows(link_id: int, metadata: Mapping[str, MetadataValue]) -> list[tuple[Any, ...]]:
    """Return the rows of `link_values` for one link."""
    return [(link_id, to_sql(key), to_sql(filter_text(value))) for key, value in metadata.items()]


class SegmentRow(NamedTuple):
    """One segment file as the catalogue knows it.

    Attributes:
        first_row, last_row: the range of its row ids; ranges of different segments never overlap.
        vectors_offset: where the (rows, dim) float32 values start in the file.
        row_ids: little-endian int64 ids in ascending order; empty where they are all of the range.
        live: one bit a row, least significant first; empty while every row lives.
        group_crcs: little-endian CRC-32 of each group of `files.GROUP_BYTES`.
    """

    segment_id: int
    sha256: str
    kind: str
    bytes: int
    rows: int
    live_rows: int
    first_row: int
    last_row: int
    dim: int
    vectors_offset: int
    row_ids: Bits
    live: Bits
    group_crcs: Bits

    @property
    def crc(self) -> int:
        """The row's checksum."""
        return row_crc(*self)


SEGMENT_COLUMNS = ", ".join(SegmentRow._fields)
