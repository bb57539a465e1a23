"""CSV and its relatives: one document a row, read as a stream."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ragkit.errors import ReadError
from ragkit.readers.base import FailedRow, ParseContext, Parsed
from ragkit.readers.encodings import detect_file
from ragkit.readers.media_type import MediaType
from ragkit.readers.table_rows import RowDocuments, find_text_column
from ragkit.readers.text_stream import open_text

_DELIMITERS = ",;\t|"
SAMPLE_CHARS = 64 * 1024
_SAMPLE_ROWS = 50
MAX_FIELD_CHARS = 8 << 20


class CsvReader:
    """Reads delimited text. Row 1 is the first below the header; a table without a header has `column_1`, ..."""

    name = "csv"
    version = 1
    media_types = frozenset((MediaType.CSV,))

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        """Yield a document for each row that has text, and a failed row for each that cannot be read."""
        encoding = detect_file(path)
        csv.field_size_limit(MAX_FIELD_CHARS)
        with open_text(path, encoding, newline="") as sample:
            delimiter, has_header = layout(sample.file.read(SAMPLE_CHARS))
        with open_text(path, encoding, newline="") as stream:
            yield from _documents(stream.file, delimiter, has_header, context)
            yield from stream.remarks()


def _documents(file: TextIO, delimiter: str, has_header: bool, context: ParseContext) -> Iterator[Parsed]:
    rows = csv.reader(file, delimiter=delimiter)
    builder = RowDocuments(context)
    columns: list[str] | None = None
    text_column: str | None = None
    number = 0
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            number += 1
            yield FailedRow(number, "corrupt", f"line {rows.line_num}: {error}")
            continue
        if columns is None:
            columns = header(cells) if has_header else [f"column_{index + 1}" for index in range(len(cells))]
            text_column = find_text_column(columns, context.text_column)
            if has_header:
                continue
        if not cells:
            continue
        number += 1
        found = builder.document(number, values_of(columns, cells), text_column)
        if found is not None:
            yield found
    yield from builder.remarks()


def values_of(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """Return the cells by column; cells beyond the header get a name of their own, absent ones are left out."""
    values = dict(zip(columns, cells, strict=False))
    for index in range(len(columns), len(cells)):
        values[f"column_{index + 1}"] = cells[index]
    return values


def header(cells: Sequence[str]) -> list[str]:
    """Return unique column names: a repeated or empty one is named after its place."""
    names: list[str] = []
    for index, cell in enumerate(cells):
        name = " ".join(cell.split())
        names.append(name if name and name not in names else f"column_{index + 1}")
    return names


def layout(sample: str) -> tuple[str, bool]:
    """Return the delimiter, and whether the first row names the columns.

    The delimiter is the one that cuts the first rows into equally many cells, and more than one; a header is a first
    row of distinct, non-empty cells none of which is a number.
    """
    best, best_score, best_rows = ",", 0.0, list(_parsed(sample, ","))
    for delimiter in _DELIMITERS:
        rows = list(_parsed(sample, delimiter))
        widths = Counter(map(len, rows))
        if not widths:
            continue
        width, count = widths.most_common(1)[0]
        score = count / len(rows) * min(width - 1, 3)
        if score > best_score:
            best, best_score, best_rows = delimiter, score, rows
    if not best_rows:
        raise ReadError("no rows", code="empty")
    first = [cell.strip() for cell in best_rows[0]]
    named = all(first) and len(set(first)) == len(first) and not any(_is_number(cell) for cell in first)
    return best, named and len(best_rows) > 1


def _parsed(sample: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the first rows of the sample; its last row is probably cut, and left out."""
    rows = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter)
    held: list[str] | None = None
    try:
        for row in itertools.islice(filter(None, rows), _SAMPLE_ROWS):
            if held is not None:
                yield held
            held = row
    except csv.Error:
        pass
    if held is not None and len(sample) < SAMPLE_CHARS:
        yield held


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", ".").lstrip("$€£").rstrip("%"))
    except ValueError:
        return False
    return True
