"""Rows of a table to documents: which column holds the text, what becomes metadata, what is left out and said."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ragkit.errors import ReadError
from ragkit.readers.base import FailedRow, ParseContext, ParsedDocument, Remark
from ragkit.readers.encodings import clean
from ragkit.types import MetadataValue

# Tried in this order, upper and lower case alike.
TEXT_COLUMNS = ("text", "content", "contents", "body", "page_content", "document", "passage", "article", "chunk")
MAX_METADATA_CHARS = 4096
_INT64 = 1 << 63


def find_text_column(columns: Sequence[str], wanted: str | None) -> str | None:
    """Return the column that holds the text, None where no name says so.

    Raises:
        ReadError: `unsupported`, where the caller named a column that is not there.
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise ReadError(
            f"no column {wanted!r} for the text; there are {', '.join(map(repr, list(columns)[:30]))}",
            code="unsupported",
        )
    folded: dict[str, str] = {}
    for column in columns:
        folded.setdefault(column.strip().casefold(), column)
    return next((folded[name] for name in TEXT_COLUMNS if name in folded), None)


class RowDocuments:
    """Turns rows into documents. Without a text column a row becomes `column: value` lines."""

    def __init__(self, context: ParseContext) -> None:
        self._limit = context.limits.max_text_bytes
        self._empty = 0
        self._long_values = 0

    def document(
        self, row: int, values: Mapping[str, Any], text_column: str | None, warnings: Sequence[str] = ()
    ) -> ParsedDocument | FailedRow | None:
        """Return the document of one row, None where it has no text."""
        text = self._text(values, text_column)
        if not text.strip():
            self._empty += 1
            return None
        if len(text) > self._limit:
            return FailedRow(row, "too_large", f"{len(text)} characters of text are over the limit of {self._limit}")
        text, replaced = clean(text)
        metadata = self._metadata(values, text_column) if text_column is not None else _title_only(values)
        return ParsedDocument(text, metadata=metadata, row=row, warnings=(*warnings, *replaced))

    def remarks(self) -> Iterator[Remark]:
        """Yield what is to be said about the table as a whole."""
        if self._empty:
            yield Remark(f"{self._empty} rows without text were left out")
        if self._long_values:
            yield Remark(
                f"{self._long_values} values of over {MAX_METADATA_CHARS} characters were left out of the metadata"
            )

    def _text(self, values: Mapping[str, Any], text_column: str | None) -> str:
        if text_column is not None:
            value = values.get(text_column)
            return value if isinstance(value, str) else "" if value is None else _rendered(value)
        shown = ((column, _rendered(value)) for column, value in values.items() if value is not None and value != "")
        return "\n".join(f"{column}: {text}" for column, text in shown)

    def _metadata(self, values: Mapping[str, Any], text_column: str | None) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {}
        for column, value in values.items():
            if column == text_column or isinstance(value, dict | list | tuple | set | bytes):
                continue
            scalar = to_scalar(value)
            if isinstance(scalar, str) and len(scalar) > MAX_METADATA_CHARS:
                self._long_values += 1
            else:
                metadata[column] = scalar
        return metadata


def to_scalar(value: Any) -> MetadataValue:
    """Return `value` as something JSON and SQLite hold: wide integers, dates and decimals become text, NaN None."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _rendered(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=_jsonable)
    return json.dumps(value) if isinstance(value, bool) else str(to_scalar(value))


def _jsonable(value: Any) -> str:
    """Return the text of a value within a nested one that JSON has no form for."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    return repr(value)


def _title_only(values: Mapping[str, Any]) -> dict[str, MetadataValue]:
    title = values.get("title")
    return {"title": title} if isinstance(title, str) and len(title) <= MAX_METADATA_CHARS else {}
