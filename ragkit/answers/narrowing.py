"""A sentence too long to quote, cut down to its most telling stretch of whole words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ragkit.answers.terms import Term
from ragkit.chunking.graphemes import grapheme_runs

_WORD = re.compile(r"\S+")


def narrowed(text: str, terms: Sequence[Term], weights: Mapping[str, float], max_chars: int) -> tuple[int, int]:
    """Return the span of at most `max_chars` characters of `text` that holds the most weight.

    It starts and stops between words (a word longer than the limit is cut between characters that a reader sees),
    and stands so that what it holds lies in its middle.
    """
    if len(text) <= max_chars:
        return 0, len(text)
    words = _words(text, max_chars)
    weighted = [(term, weights[term.stem]) for term in terms if weights.get(term.stem, 0.0) > 0]
    best, held = -1.0, (0, 0)
    for first, (term, _) in enumerate(weighted):
        inside = [pair for pair in weighted[first:] if pair[0].stop <= term.start + max_chars]
        weight = sum({one.stem: value for one, value in inside}.values())
        if inside and weight > best + 1e-9:
            best, held = weight, (term.start, max(one.stop for one, _ in inside))
    return _grown(words, held, max_chars)


def _words(text: str, max_chars: int) -> list[tuple[int, int]]:
    words: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        if len(match.group()) <= max_chars:
            words.append(match.span())
            continue
        edges = [match.start()]
        for run in grapheme_runs(match.group(), 8):
            edges.append(edges[-1] + len(run))
        words += pairwise(edges)
    return words


def _grown(words: list[tuple[int, int]], held: tuple[int, int], max_chars: int) -> tuple[int, int]:
    """Return the words around `held`, taken evenly from both sides while they fit."""
    first = max((index for index, word in enumerate(words) if word[0] <= held[0]), default=0)
    last = first
    while last + 1 < len(words) and words[last][1] < held[1] and words[last + 1][1] - words[first][0] <= max_chars:
        last += 1
    while True:
        left = first > 0 and words[last][1] - words[first - 1][0] <= max_chars
        right = last + 1 < len(words) and words[last + 1][1] - words[first][0] <= max_chars
        if not (left or right):
            return words[first][0], words[last][1]
        room_left, room_right = held[0] - words[first][0], words[last][1] - held[1]
        if left and (not right or room_left <= room_right):
            first -= 1
        else:
            last += 1
