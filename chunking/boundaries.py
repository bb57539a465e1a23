"""Where a text may be cut, by kind: paragraphs, lines, sentences. Each kind is a list of offsets, ascending."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum

from ragkit.chunking.sentences import sentence_starts

_BREAK = r"[\n\r\x0c\x85\u2028\u2029]"
_LINE = re.compile(rf"{_BREAK}(?:\s*{_BREAK})?")  # through the last break of a run; indentation stays with its line
_PARAGRAPH_BREAK = re.compile(r"\n[^\S\n]*\n|\r[^\S\n\r]*\r|\x0c|\u2029")
# A Markdown heading with the blank lines behind it: `# title`, or a title underlined with === or ---.
_HEADING = re.compile(
    r"^(?:[ ]{0,3}\#{1,6}[ \t][^\n]*+|[^\s|#>\-=*][^\n]{0,200}\n[ ]{0,3}(?:={3,}|-{3,})[ \t]*+)\n\s*+", re.MULTILINE
)


class Boundary(StrEnum):
    """A kind of place to cut at, strongest first."""

    PARAGRAPH = "paragraph"
    LINE = "line"
    SENTENCE = "sentence"
    WORD = "word"


def boundary_offsets(text: str, kind: Boundary, sentences: Callable[[str], list[int]] = sentence_starts) -> list[int]:
    """Return the offsets at which a new unit of `kind` (paragraph, line or sentence) starts, 0 and the end left out.

    White space belongs to the unit before it, indentation to its line. A unit never starts right after a Markdown
    heading, so that headings stay with what follows them. `sentences` gives the starts of a text's sentences.
    """
    if kind is Boundary.SENTENCE:
        offsets = sentences(text)[1:]
    else:
        breaks = _LINE.finditer(text)
        if kind is Boundary.PARAGRAPH:
            offsets = [match.end() for match in breaks if _PARAGRAPH_BREAK.search(match.group())]
        else:
            offsets = [match.end() for match in breaks]
    headings = [match.span() for match in _HEADING.finditer(text)]
    inside = _Spans(headings)
    return [offset for offset in offsets if 0 < offset < len(text) and not inside.hold(offset)]


class _Spans:
    """Answers, for ascending offsets, whether one lies in (start, stop] of any of some ascending spans."""

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        self._spans = spans
        self._next = 0

    def hold(self, offset: int) -> bool:
        while self._next < len(self._spans) and self._spans[self._next][1] < offset:
            self._next += 1
        return self._next < len(self._spans) and self._spans[self._next][0] < offset
