"""Text as words with an estimate of each word's tokens: what packing works on.

Tokenising is the dearest part of chunking, so the text is not tokenised to find the cuts. Words are counted once
each and remembered; the sum over a stretch is its estimated count, exact for tokenizers whose tokens never span
two words (all byte-level BPE models) and close for the others. The true count of every chunk is taken afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.graphemes import grapheme_runs
from ragkit.types import TextTokenizer

Offsets = NDArray[np.int64]

# A line break with the white space before it; a word with the space before it; white space.
_WORD = re.compile(r"\s*[\n\r\x0c\x85\u2028\u2029]|\s?\S+|\s+(?!\S)|\s")
# The same, words ended by CJK full stops too: no space follows those.
_CJK_STOPS = "。！？｡"
_CJK_WORD = re.compile(
    rf"\s*[\n\r\x0c\x85\u2028\u2029]|\s?[^\s{_CJK_STOPS}]*+[{_CJK_STOPS}]++[\"'”’»›)\]}}」』）】》〉]*+"
    r"|\s?\S+|\s+(?!\S)|\s"
)
_LONGEST = 32  # longer words (URLs, base64, scripts without spaces) are cut into pieces
_LONGEST_NON_ASCII = 24  # the same for words with other characters, which have more tokens each
_GRAPHEMES_A_PIECE = 6
_REMEMBERED = 200_000
_ANY_WORD = "a"


@dataclass(frozen=True, slots=True)
class Words:
    """The pieces of a text, in order and without gaps.

    Attributes:
        starts: (pieces + 1,) offset of each piece; the last entry is the length of the text.
        tokens: (pieces + 1,) estimated tokens before each piece; the last entry is the total.
        opens_word: (pieces,) False for the second and later pieces of a word that was too long.
    """

    starts: Offsets
    tokens: Offsets
    opens_word: NDArray[np.bool_]


class WordCounter:
    """Splits text into words and estimates their tokens, remembering the words it has seen."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def measure(self, text: str) -> Words:
        """Return the words of `text`; words longer than 32 characters come in pieces, never cut inside a grapheme."""
        words: list[str] = _pattern(text).findall(text)
        lengths = list(map(len, words))
        if max(lengths, default=0) <= _LONGEST_NON_ASCII:
            return self._measured(words, lengths, None)
        pieces, opens = _cut_long(words, lengths)
        return self._measured(pieces, list(map(len, pieces)), opens)

    def measure_graphemes(self, text: str) -> Words:
        """Return the grapheme clusters of `text` one by one, each tokenised apart."""
        graphemes = grapheme_runs(text, 1)
        return self._measured(graphemes, list(map(len, graphemes)), None)

    def measure_code_points(self, text: str) -> Words:
        """Return the code points of `text` one by one, each tokenised apart."""
        return self._measured(list(text), [1] * len(text), None)

    def _measured(self, words: list[str], lengths: list[int], opens: NDArray[np.bool_] | None) -> Words:
        starts = _running_sum(lengths)
        tokens = _running_sum(self._counts(words))
        return Words(starts, tokens, np.ones(len(words), dtype=np.bool_) if opens is None else opens)

    def _counts(self, words: Sequence[str]) -> list[int]:
        known = self._known
        unseen = list(set(words).difference(known))
        if unseen:
            if len(known) + len(unseen) > _REMEMBERED:
                known.clear()
                unseen = list(set(words))
            known.update(zip(unseen, self._estimates(unseen), strict=True))
        return [known[word] for word in words]

    def _estimates(self, words: Sequence[str]) -> list[int]:
        # White space merges otherwise at the end of a text than before a word, and mostly a word follows.
        behind = [word + _ANY_WORD if word.isspace() else word for word in words]
        *counts, any_word = self._tokenizer.count_batch([*behind, _ANY_WORD])
        return [
            max(1, count - any_word) if word.isspace() else count for word, count in zip(words, counts, strict=True)
        ]


def word_starts(text: str) -> list[int]:
    """Return where the words of `text` start, each with the space before it; long words are left whole."""
    return [match.start() for match in _pattern(text).finditer(text)]


def _pattern(text: str) -> re.Pattern[str]:
    return _WORD if text.isascii() or not any(stop in text for stop in _CJK_STOPS) else _CJK_WORD


def _running_sum(values: list[int]) -> Offsets:
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def _cut_long(words: list[str], lengths: list[int]) -> tuple[list[str], NDArray[np.bool_]]:
    """Return the words with the long ones in pieces, and whether each piece opens a word."""
    pieces: list[str] = []
    inner: list[int] = []
    done = 0
    for index, length in enumerate(lengths):
        if length > _LONGEST_NON_ASCII and (length > _LONGEST or not words[index].isascii()):
            pieces += words[done:index]
            inner += range(len(pieces) + 1, len(pieces) + len(cut := _pieces(words[index])))
            pieces += cut
            done = index + 1
    pieces += words[done:]
    opens = np.ones(len(pieces), dtype=np.bool_)
    opens[inner] = False
    return pieces, opens


def _pieces(word: str) -> list[str]:
    return grapheme_runs(word, _LONGEST if word.isascii() else _GRAPHEMES_A_PIECE)
