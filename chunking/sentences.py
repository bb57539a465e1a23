"""Sentence boundaries by rule, as offsets that tile the text.

A sentence ends after `.`, `!`, `?`, an ellipsis or their CJK forms, together with closing quotes, brackets and
`[12]` reference marks behind them, where what follows can open a sentence. It also ends at a blank line, before a
list item, heading or table row, and after a short line that ends without a full stop (a title, a table row).
White space between two sentences belongs to the first. The rules and libraries that were compared stand in
docs/dependencies.md.
"""

from __future__ import annotations

import re
from itertools import pairwise

_CLOSERS = "\"'”’»›)\\]}」』）】》〉"
_OPENERS = "\"'“‘«‹([{「『（【《〈¿¡*_"
_CJK_STOPS = "。！？｡"

# One class first, which the engine skips to as fast as it can; the branches then ask which of its kinds was found.
_STOPS, _BREAKS = ".!?…‽؟۔।", r"\n\r\x0c\x85\u2028\u2029"
_CANDIDATE = re.compile(
    rf"""
    [{_STOPS}{_CJK_STOPS}{_BREAKS}]
    (?: (?<=[{_STOPS}])(?<![{_STOPS}]{{2}})[{_STOPS}]*+[{_CLOSERS}]*+(?:\[\w{{1,4}}\])*+(?P<space>\s++)
      | (?<=[{_CJK_STOPS}])[{_CJK_STOPS}]*+[{_CLOSERS}]*+\s*+
      | (?<=[{_BREAKS}])\s*+
    )
    """,
    re.VERBOSE,
)
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n|\r[^\S\n\r]*\r|\x0c|\u2029")
_NEW_BLOCK = re.compile(r"[-*+•‣◦–—]\s|\#{1,6}\s|\||>\s|(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,4})[.)]\s|```|===|---")
_ENUMERATOR = re.compile(r"\s*+\(?(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,4})[.)]*\Z")
_WORD = re.compile(r"\w+")
_SHORT_LINE = 50
_LINE_REACH = 2000


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the end of a sentence: something always follows.
_LEADING = _words(
    """
    mr mrs ms mx messrs dr drs prof profs rev hon gen maj col lt capt cpt cmdr adm sgt cpl pvt gov sen rep pres supt
    insp st sts mt ft fr sr. sra dna mme mlle mm herr frau dipl ing
    fig figs eq eqs eqn ref refs sec sect ch chap art no nos nr vol vols pp pg para ver app tab ex op ed eds
    cf vs viz ca approx esp incl resp i.e e.g z.b d.h u.a bzw sog vgl p.ex
    """
)
# May end a sentence: it does where the next word is one that sentences start with.
_TRAILING = _words(
    """
    inc ltd co corp llc plc gmbh bros jr sr esq etc al ph.d m.d b.a m.a b.sc m.sc d.c u.s u.k u.n e.u u.s.a u.s.s.r
    a.m p.m a.d b.c c.e b.c.e jan feb mar apr jun jul aug sept sep oct nov dec mon tue tues wed thu thur thurs fri
    dept univ assn ave blvd rd hwy sq est min max avg std ibid usw
    """
)
_STARTERS = _words(
    """
    the a an this that these those it its he she they we i you his her their our my your there here in on at by for
    from with as if nor when while where after before during since until although though because however moreover
    furthermore therefore thus hence meanwhile nevertheless nonetheless also and but or so yet then what who why how
    which some many most both each all no not one two under over between among according despite unlike
    today now later
    """
)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return half-open spans that tile `text`, one a sentence; no text gives no spans."""
    starts = [*sentence_starts(text), len(text)]
    return list(pairwise(starts)) if text else []


def sentence_starts(text: str) -> list[int]:
    """Return the offset of the first code point of each sentence of `text`, ascending; the first is 0."""
    if not text:
        return []
    starts = [0]
    end = len(text)
    for match in _CANDIDATE.finditer(text):
        stop = match.end()
        if stop < end and _ends_sentence(text, starts[-1], match):
            starts.append(stop)
    return starts


def _ends_sentence(text: str, sentence_start: int, match: re.Match[str]) -> bool:
    space = match["space"]
    if space is None:
        gap = match.group()
        return gap[0] in _CJK_STOPS or _line_ends(text, sentence_start, match.start(), gap, match.end())
    if _BLANK_LINE.search(space):
        return True
    if not _can_open(text, match.end()):
        return False
    if text[match.start()] == "." and text[match.start() + 1] not in ".!?":
        return not _is_abbreviation(text, sentence_start, match.start(), match.end())
    return True


def _can_open(text: str, at: int) -> bool:
    """Whether the text at `at` can be the first of a sentence: anything but a lower-case word or punctuation."""
    at = _skip_openers(text, at)
    if at == len(text):
        return True
    first = text[at]
    return (first.isalnum() and not first.islower()) or first in "#$€£¥•-–—|@" or ord(first) > 0x2190


def _is_abbreviation(text: str, sentence_start: int, dot: int, next_start: int) -> bool:
    """Whether the full stop at `dot` belongs to the word before it and does not end the sentence."""
    start = dot
    while start > sentence_start and dot - start < 12 and not text[start - 1].isspace():
        start -= 1
    word = text[start:dot].lstrip(_OPENERS)
    if not word:
        return False
    if dot - sentence_start < 12 and _ENUMERATOR.match(text, sentence_start, dot):
        return True
    lowered = word.lower()
    if lowered in _LEADING:
        return lowered not in ("no", "art", "app", "ex", "sec", "fig", "mt", "ed") or _number_follows(text, next_start)
    one_letter = len(word) == 1 and word.isalpha()
    dotted = len(word) > 2 and word[1] == "." and word[::2].isalpha()
    return (one_letter or dotted or lowered in _TRAILING) and not _starts_sentence(text, next_start)


def _starts_sentence(text: str, at: int) -> bool:
    """Whether the word at `at` is one that sentences start with; `A.` and `I.` are initials."""
    word = _WORD.match(text, _skip_openers(text, at))
    return word is not None and word.group().lower() in _STARTERS and text[word.end() : word.end() + 1] != "."


def _line_ends(text: str, sentence_start: int, at: int, gap: str, next_start: int) -> bool:
    """Whether the line break `gap` at `at`, with no full stop before it, ends a sentence."""
    if _BLANK_LINE.search(gap) or _NEW_BLOCK.match(text, next_start):
        return True
    line_start = max(text.rfind("\n", max(0, at - _LINE_REACH), at) + 1, at - _LINE_REACH, 0)
    if text[line_start] in "#|":
        return True
    return line_start < at < line_start + _SHORT_LINE and text[at - 1] != "," and not text[next_start].islower()


def _number_follows(text: str, at: int) -> bool:
    return text[at : at + 1].isdigit()


def _skip_openers(text: str, at: int) -> int:
    while at < len(text) and text[at] in _OPENERS:
        at += 1
    return at
