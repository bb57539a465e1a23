"""The headings of a text and the path of headings above any place in it.

Found are Markdown headings (`# title`, and titles underlined with === or ---), HTML headings, wiki headings
(`== title ==`, and the spaced form of WikiText), and the numbering of laws and contracts: `Article 5`, `§ 12`,
`2.1 Definitions`. Fenced code blocks and the front matter of Markdown hold none. Lines may end in CRLF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import unescape

from ragkit.types import Metadata

PATH_SEPARATOR = " > "
_LONGEST_TITLE = 120  # code points of a title that a path shows

_FENCE = re.compile(r"^[ ]{0,3}(?P<mark>`{3,}|~{3,})[^\n]*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(?=[\w\"'-][^\n:]{0,80}:)(?:(?!---)[^\n]*\n){1,200}?---[ \t]*\r?(?:\n|\Z)")
_HEADING = re.compile(
    r"""
      ^[ ]{0,3}(?P<hashes>\#{1,6})[ \t]+(?P<hashed>[^\n]*)$
    | ^(?P<underlined>[^\s|\#>\-=*+<][^\n]{0,200})\n[ ]{0,3}(?P<line>={3,}|-{3,})[ \t\r]*$
    | ^[ ]?(?P<equals>=(?:[ ]?=){0,5})[ ]*(?P<wiki>[^=\s][^\n=]{0,200}?)[ ]*(?P=equals)[ ]?\r?$
    | <[hH](?P<html_level>[1-6])\b[^<>]{0,300}>(?P<html>[^\n]{0,400}?)</[hH](?P=html_level)\s*>
    | ^[ \t]*(?P<legal>(?P<kind>Part|Title|Chapter|Schedule|Annex|Appendix|Exhibit|Article|Section|Clause|§§?)
        [ \t]*(?P<number>[0-9]{1,4}[a-z]?(?:\.[0-9]{1,3}){0,4}|[IVXLC]{1,7}|[A-Z])\b(?![\w(])[^\n]{0,90})$
    | ^[ \t]*(?P<decimal>(?P<places>[0-9]{1,3}(?:\.[0-9]{1,3}){0,4})\.?[ \t]+[A-Z][^\n]{1,90}(?<![.,;:!?|\s]))[ \t\r]*$
    """,
    re.MULTILINE | re.VERBOSE,
)
_CAPITAL_KINDS = re.compile(r"\b(?:PART|TITLE|CHAPTER|SCHEDULE|ANNEX|APPENDIX|EXHIBIT|ARTICLE|SECTION|CLAUSE)\b")
_TAG = re.compile(r"<[^<>]*>")
_LEGAL_LEVELS = {"part": 1, "title": 1, "schedule": 1, "annex": 1, "appendix": 1, "exhibit": 1, "chapter": 2}
_ARTICLE_LEVEL = 3  # articles, sections, clauses and paragraphs


@dataclass(frozen=True, slots=True)
class Heading:
    """One heading: `char_start` is where its line or tag starts; `level` 1 is the highest."""

    level: int
    title: str
    char_start: int
    char_stop: int


def outline(text: str) -> list[Heading]:
    """Return the headings of `text` in order."""
    fences = list(_fenced(text))
    found: list[Heading] = []
    fence = 0
    front = _FRONT_MATTER.match(text)
    for match in _HEADING.finditer(_with_title_case(text), front.end() if front else 0):
        while fence < len(fences) and fences[fence][1] <= match.start():
            fence += 1
        if fence < len(fences) and fences[fence][0] <= match.start():
            continue
        level, group = _level(match)
        title = text[match.start(group) : match.end(group)]
        if group == "html":
            title = unescape(_TAG.sub("", title))
        elif group == "hashed":
            title = _without_closing_hashes(title)
        title = " ".join(title.split())
        if title:
            found.append(Heading(level, title, match.start(), match.end()))
    return found


def heading_path(headings: Sequence[Heading], char: int) -> tuple[str, ...]:
    """Return the titles of the headings above code point `char`, highest first; a heading is above its own text."""
    path: list[Heading] = []
    for heading in headings:
        if heading.char_start > char:
            break
        while path and path[-1].level >= heading.level:
            path.pop()
        path.append(heading)
    return tuple(heading.title for heading in path)


def heading_paths(headings: Sequence[Heading], chars: Sequence[int]) -> list[tuple[str, ...]]:
    """Return `heading_path` of each of `chars` (ascending) in one pass."""
    paths: list[tuple[str, ...]] = []
    stack: list[Heading] = []
    at = 0
    for char in chars:
        while at < len(headings) and headings[at].char_start <= char:
            while stack and stack[-1].level >= headings[at].level:
                stack.pop()
            stack.append(headings[at])
            at += 1
        paths.append(tuple(heading.title for heading in stack))
    return paths


def heading_metadata(path: Sequence[str]) -> Metadata:
    """Return `{"heading_path": "Guide > Install"}`, or nothing where there is no heading above."""
    return {"heading_path": PATH_SEPARATOR.join(map(_shown, path))} if path else {}


def _shown(title: str) -> str:
    """Return a title as paths show it: a heading of one endless line must not be repeated with every chunk."""
    return title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1].rstrip()}…"


def _without_closing_hashes(title: str) -> str:
    """Return the title of `# title ##` without the hashes behind it; those of `C#` are the title's own."""
    bare = title.rstrip()
    inner = bare.rstrip("#")
    return inner if inner[-1:] in (" ", "\t", "") else bare


def _with_title_case(text: str) -> str:
    """Return `text` with ARTICLE written Article and so on; every offset stays."""
    return _CAPITAL_KINDS.sub(lambda match: match.group().capitalize(), text)


def _level(match: re.Match[str]) -> tuple[int, str]:
    """Return the level of a heading and the group that holds its title."""
    if match["hashes"] is not None:
        return len(match["hashes"]), "hashed"
    if match["line"] is not None:
        return (1 if match["line"][0] == "=" else 2), "underlined"
    if match["equals"] is not None:
        return match["equals"].count("="), "wiki"
    if match["html_level"] is not None:
        return int(match["html_level"]), "html"
    if match["legal"] is not None:
        depth = match["number"].count(".")
        return _LEGAL_LEVELS.get(match["kind"].lower(), _ARTICLE_LEVEL) + depth, "legal"
    return _ARTICLE_LEVEL + match["places"].count("."), "decimal"


def _fenced(text: str) -> Iterator[tuple[int, int]]:
    """Yield the spans of fenced code blocks; one that is never closed goes on to the end."""
    opened: re.Match[str] | None = None
    for match in _FENCE.finditer(text):
        if opened is None:
            opened = match
        elif match["mark"].startswith(opened["mark"]) and not match.group().strip(" `~\t\r"):
            yield opened.start(), match.end()
            opened = None
    if opened is not None:
        yield opened.start(), len(text)
