"""JSON Lines: one document a line, read as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ragkit.errors import ReadError
from ragkit.readers.base import FailedRow, ParseContext, Parsed
from ragkit.readers.encodings import detect_file
from ragkit.readers.media_type import MediaType
from ragkit.readers.table_rows import RowDocuments, find_text_column
from ragkit.readers.text_stream import open_text

_MAX_LINE_CHARS = 64 << 20


class JsonlReader:
    """Reads JSON Lines; the row number is the line number. A line is an object, or a string that is the text."""

    name = "jsonl"
    version = 1
    media_types = frozenset((MediaType.JSONL,))

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        """Yield a document for each line that has text, and a failed row for each that cannot be read."""
        builder = RowDocuments(context)
        with open_text(path, detect_file(path), newline="\n") as stream:
            for number, line in numbered_lines(stream.file):
                found = _row(builder, number, line, context)
                if found is not None:
                    yield found
            yield from stream.remarks()
        yield from builder.remarks()


def _row(builder: RowDocuments, number: int, line: str | None, context: ParseContext) -> Parsed | None:
    if line is None:
        return FailedRow(number, "too_large", f"the line has over {_MAX_LINE_CHARS} characters")
    if not line.strip():
        return None
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        return FailedRow(number, "corrupt", f"not JSON: {error}")
    except RecursionError:
        return FailedRow(number, "corrupt", "nested too deeply")
    if isinstance(values, str):
        return builder.document(number, {"text": values}, "text")
    if not isinstance(values, dict):
        return FailedRow(number, "corrupt", f"a line must hold an object or a string, got {type(values).__name__}")
    try:
        text_column = find_text_column(tuple(values), context.text_column)
    except ReadError as error:
        return FailedRow(number, error.code, str(error))
    return builder.document(number, values, text_column)


def numbered_lines(file: TextIO) -> Iterator[tuple[int, str | None]]:
    """Yield numbered lines; None stands for one that is too long to be held."""
    number = 0
    while line := file.readline(_MAX_LINE_CHARS):
        number += 1
        if len(line) < _MAX_LINE_CHARS or line.endswith("\n"):
            yield number, line
            continue
        while line and not line.endswith("\n"):
            line = file.readline(_MAX_LINE_CHARS)
        yield number, None
