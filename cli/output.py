"""Where a command's words go: results to stdout, everything else to stderr.

With `--json` stdout carries one JSON object and nothing else. Text of documents may hold terminal control sequences;
they never reach the terminal.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_DIM, _BOLD, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


class Output:
    """Writes results and notes. A closed pipe (`ragkit ls | head`) ends the writing, not the command."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.closed = False
        self._waiting: Waiting | None = None

    def result(self, data: Mapping[str, Any], lines: Iterable[str]) -> None:
        """Write a result: `data` as the JSON object, or `lines` for people."""
        if self.json:
            self.write(json_text(data))
            return
        for line in lines:
            self.write(line + "\n")

    def write(self, text: str) -> None:
        """Write to stdout at once; does nothing after the reader has gone."""
        if self.closed:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            self.closed = True
            discard_stdout()

    def note(self, text: str) -> None:
        """Write one dim line to stderr, unless `--quiet`."""
        if not self.quiet:
            self.settle()
            sys.stderr.write(dim(text, sys.stderr) + "\n")
            sys.stderr.flush()

    def settle(self) -> None:
        """Erase what `waiting` shows, so that another line can be written to stderr."""
        if self._waiting is not None:
            self._waiting.done()
            self._waiting = None

    @contextmanager
    def waiting(self, text: str) -> Iterator[Waiting]:
        """Show `text` on a terminal until something else is written, `done()`, or the end of the block."""
        self._waiting = waiting = Waiting("" if self.quiet or not is_terminal(sys.stderr) else text)
        try:
            yield waiting
        finally:
            self.settle()


class Waiting:
    """A line on the terminal that disappears."""

    def __init__(self, text: str) -> None:
        self._shown = bool(text)
        if text:
            sys.stderr.write(dim(text, sys.stderr))
            sys.stderr.flush()

    def done(self) -> None:
        """Erase the line; the second call does nothing."""
        if self._shown:
            self._shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def json_text(data: Mapping[str, Any]) -> str:
    """Return `data` as one JSON object: indented on a terminal, one line elsewhere."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    indent = 2 if is_terminal(sys.stdout) else None
    return json.dumps(data, ensure_ascii=not utf8, indent=indent, allow_nan=False) + "\n"


def is_terminal(stream: Any) -> bool:
    """Return whether a person watches `stream`."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def dim(text: str, stream: Any) -> str:
    """Return `text` dimmed where `stream` shows colour."""
    return f"{_DIM}{text}{_PLAIN}" if _has_colour(stream) else text


def bold(text: str, stream: Any) -> str:
    """Return `text` in bold where `stream` shows colour."""
    return f"{_BOLD}{text}{_PLAIN}" if _has_colour(stream) else text


def printable(text: str) -> str:
    """Return `text` without control characters other than tab and newline: they could rewrite the screen."""
    return _CONTROL.sub("", text)


def one_line(text: str, limit: int | None = None) -> str:
    """Return `text` printable on one line, cut at `limit` characters."""
    line = " ".join(printable(text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1].rstrip() + "…"


def without_uri(message: str, uri: str) -> str:
    """Return `message` on one line, without the URI that it may begin with: the line it goes to names it already."""
    return one_line(message.removeprefix(f"{uri}: "))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Yield aligned lines; columns of numbers are flush right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(header)]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    for row in [list(header), *cells]:
        columns = (text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True))
        yield "  ".join(columns).rstrip()


def human_bytes(count: float) -> str:
    """Return a size for people: `1.5 MB`; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def discard_stdout() -> None:
    """Let later writes to stdout, the interpreter's last flush included, go nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _cell(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return one_line(str(value))


def _has_colour(stream: Any) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR")
