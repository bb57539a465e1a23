"""Builds readable text from inline runs and block boundaries: what HTML, DOCX and EPUB have in common."""

from __future__ import annotations

from enum import IntEnum

_INDENT = "  "


class Gap(IntEnum):
    """What stands between the last text and the next; the widest that was asked for wins."""

    NONE = 0
    SPACE = 1
    LINE = 2
    BLANK = 3


class BlockText:
    """Collects text. White space is collapsed as a browser does; nothing is written until text follows it.

    Headings begin with as many `#` as their level, list items with `- `, cells of a row are joined by ` | `.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._gap = Gap.NONE
        self._marker = ""
        self._in_cell = False
        self._cell_has_text = False
        self._row_has_text = False
        self._boundaries = 0  # between cells, since the last text of this row

    def inline(self, text: str) -> None:
        """Add a run of text; white space within is collapsed, and kept at its ends as one space."""
        words = text.split()
        if not words:
            if text:
                self._widen(Gap.SPACE)
            return
        if text[0].isspace():
            self._widen(Gap.SPACE)
        self._write(" ".join(words))
        if text[-1].isspace():
            self._gap = Gap.SPACE

    def verbatim(self, text: str) -> None:
        """Add text as it is, line breaks included."""
        if text:
            self._write(text.replace("\r\n", "\n").replace("\r", "\n"))

    def end_verbatim(self) -> None:
        """Drop the line breaks at the end of verbatim text; what follows asks for its own."""
        while self._parts and not (trimmed := self._parts[-1].rstrip("\n")):
            self._parts.pop()
        if self._parts:
            self._parts[-1] = trimmed

    def line(self) -> None:
        """Make what follows start on a new line."""
        if self._cell_has_text or not self._in_cell:
            self._widen(Gap.LINE)

    def blank(self) -> None:
        """Make what follows stand after an empty line; within a table cell, on a new line."""
        if self._in_cell:
            self.line()
        else:
            self._widen(Gap.BLANK)

    def heading(self, level: int) -> None:
        """Begin a heading of level 1 to 6."""
        self.blank()
        self._marker = "#" * level + " "

    def item(self, depth: int, marker: str = "- ") -> None:
        """Begin a list item; `depth` 1 is the outermost list."""
        self.line()
        self._marker = _INDENT * (depth - 1) + marker

    def end_marked(self) -> None:
        """End a heading or a list item; without text it leaves no trace."""
        self._marker = ""

    def row(self) -> None:
        """Begin a table row."""
        self._in_cell = self._row_has_text = False
        self._boundaries = 0
        self._widen(Gap.LINE)

    def cell(self, index: int) -> None:
        """Begin the cell with 0-based `index` of its row."""
        self._in_cell, self._cell_has_text = True, False
        if index:
            self._boundaries += 1
            if self._row_has_text:
                self._gap = Gap.NONE

    def end_row(self) -> None:
        """End a table row; empty cells at its end leave no trace."""
        self.row()

    def text(self) -> str:
        """Return what was collected, without white space at the ends."""
        return "".join(self._parts).strip()

    def _widen(self, gap: Gap) -> None:
        self._gap = max(self._gap, gap)

    def _write(self, text: str) -> None:
        if self._parts and self._gap:
            self._parts.append((" ", "\n", "\n\n")[self._gap - 1])
        if self._boundaries:
            self._parts.append((" | " if self._row_has_text else "| ") * self._boundaries)
            self._boundaries = 0
        if self._marker:
            self._parts.append(self._marker)
            self._marker = ""
        self._parts.append(text)
        self._gap = Gap.NONE
        self._cell_has_text = self._row_has_text = True
