"""The content words of a text, stemmed, with their places: what lexical support is counted in."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+(?:[\u0300-\u036f]+[^\W_]*)*")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]")
_STOP_TEXT = """
a an the this that these those some any each every all both either neither no not nor only own same such other
another i me my mine we us our ours you your yours he him his she her hers it its they them their theirs
who whom whose which what when where why how there here
am is are was were be been being do does did done doing have has had having will would shall should can could may
might must ought need get got
and or but if then than so as of at by for with about against between into through during before after above below
to from up down in out on off over under again further once while because until since per via
much many more most few less least very too also just even still yet ever never
tell give show list name named explain describe say said find know mean does kind type
s t d ll ve re m don didn doesn isn aren wasn weren won
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())


class Term(NamedTuple):
    """One content word: its stem and its half-open span."""

    stem: str
    start: int
    stop: int


def terms(text: str) -> list[Term]:
    """Return the content words of `text` in order; words of no content (the, how, did) are left out.

    Scripts without spaces between words give their pairs of characters.
    """
    spaced = text.isascii() or not _UNSPACED.search(text)
    found = []
    for match in _WORD.finditer(text):
        word = match.group()
        if not spaced and len(word) > 2 and _UNSPACED.match(word):
            start = match.start()
            found += [Term(word[at : at + 2], start + at, start + at + 2) for at in range(len(word) - 1)]
        elif root := stem(word):
            found.append(Term(root, match.start(), match.end()))
    return found


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Return the stem of one word, or "" where the word has no content.

    Case, accents and the commonest English endings (plural, past, -ing, -ly) are taken off, so that `cities` meets
    `city` and `stopped` meets `stop`. Other languages lose an ending at worst, in question and text alike.
    """
    folded = word.casefold()
    if not folded.isascii():
        folded = "".join(char for char in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(char))
    if folded in _STOP_WORDS:
        return ""
    return _without_ending(folded) if folded.isalpha() and len(folded) > 3 else folded


def _without_ending(word: str) -> str:
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + instead
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ingly", "edly", "ing", "ed", "ly"):
        if (
            word.endswith(ending)
            and len(word) > len(ending) + 2
            and any(char in "aeiouy" for char in word[: -len(ending)])
        ):
            word = word[: -len(ending)]
            if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiousl":
                word = word[:-1]
            break
    return word[:-1] if len(word) > 4 and word.endswith("e") else word
