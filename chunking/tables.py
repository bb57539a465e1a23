"""Tables in a text: where they and their rows lie, and the header that names their columns."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape

_PIPE_TABLE = re.compile(
    r"^(?P<header>[^\n|]*+\|[^\n]*)\n"
    r"[ \t]*+\|?[ \t]*+:?-++:?[ \t]*+(?:\|[ \t]*+:?-++:?[ \t]*+)*+\|?[ \t]*+\r?(?:\n|\Z)"
    r"(?P<rows>(?:[^\n]*\|[^\n]*(?:\n|\Z))*)",
    re.MULTILINE,
)
_HTML_TABLE = re.compile(r"<table\b|</table\s*>", re.IGNORECASE)
_HTML_ROW = re.compile(r"<tr\b", re.IGNORECASE)
_CELL = re.compile(r"<t[hd]\b[^<>]{0,300}>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_LONGEST_HEADER = 1000


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        header: the names of the columns as one line, cells parted by ` | `.
        char_start, char_stop: its span.
        rows: where each row below the header starts, ascending.
    """

    header: str
    char_start: int
    char_stop: int
    rows: tuple[int, ...]


def find_tables(text: str) -> list[Table]:
    """Return the Markdown tables (a row of dashes under the header) and HTML tables of `text`, in order."""
    found = [_pipe_table(match) for match in _PIPE_TABLE.finditer(text)] if "|" in text else []
    found += _html_tables(text)
    found.sort(key=lambda table: table.char_start)
    apart: list[Table] = []
    for table in found:
        if not apart or table.char_start >= apart[-1].char_stop:
            apart.append(table)
    return apart


def table_header(tables: Sequence[Table], char: int) -> str | None:
    """Return the header of the table whose rows hold code point `char`, or None outside and on the header itself."""
    index = bisect_right([table.char_start for table in tables], char) - 1
    if index < 0:
        return None
    table = tables[index]
    return table.header if table.rows and table.rows[0] <= char < table.char_stop else None


def _pipe_table(match: re.Match[str]) -> Table:
    cells = match["header"].strip().strip("|").split("|")
    start = match.start("rows")
    rows = [start + line.start() for line in re.finditer(r"[^\n]+(?:\n|\Z)", match["rows"])]
    return Table(_line(cells), match.start(), match.end(), tuple(rows))


def _html_tables(text: str) -> list[Table]:
    """Return the outermost HTML tables that are closed."""
    found: list[Table] = []
    depth = start = 0
    for match in _HTML_TABLE.finditer(text):
        if match.group()[1] != "/":
            start = match.start() if depth == 0 else start
            depth += 1
        elif depth:
            depth -= 1
            rows = [row.start() for row in _HTML_ROW.finditer(text, start, match.end())] if depth == 0 else []
            if rows:
                stop = rows[1] if len(rows) > 1 else match.end()
                cells = _CELL.split(text[rows[0] : min(stop, rows[0] + _LONGEST_HEADER)])[1:]
                names = [unescape(_TAG.sub("", cell)) for cell in cells]
                found.append(Table(_line(names), start, match.end(), tuple(rows[1:])))
    return found


def _line(cells: Sequence[str]) -> str:
    return " | ".join(" ".join(cell.split()) for cell in cells)[:_LONGEST_HEADER]
