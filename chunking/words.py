"""Text as words with an estimate of each word's tokens: what packing works on.

Tokenising is the dearest part of chunking, so the text is not tokenised to find the cuts. Words are counted once each
and remembered; the sum over a stretch is its estimated count, exact for tokenizers whose tokens never span two words
(all byte-level BPE models) and close for the others. The true count of every chunk is taken afterwards, unless the
tokenizer says that its words add up (`AdditiveTokenizer`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
# White space for Python, and none, or nothing at all, for tokenizers.
_NO_SPACE = re.compile(r"[\x0b\x0c\x1c-\x1f\x85]")
_LONGEST = 32  # longer words (URLs, base64, scripts without spaces) are cut into pieces
_LONGEST_NON_ASCII = 24  # the same for words with other characters, which have more tokens each
_GRAPHEMES_A_PIECE = 6
_REMEMBERED = 200_000
_ANY_WORD = "a"


@runtime_checkable
class AdditiveTokenizer(Protocol):
    """What a `TextTokenizer` may say of itself, so that texts need not be tokenised again to be counted."""

    @property
    def words_add_up(self) -> bool:
        """Whether a text has as many tokens as its words, cut at white space, have together, and white space none."""
        ...


@dataclass(frozen=True, slots=True)
class Words:
    """The pieces of a text, in order and without gaps.

    Attributes:
        starts: (pieces + 1,) offset of each piece; the last entry is the length of the text.
        tokens: (pieces + 1,) estimated tokens before each piece; the last entry is the total.
        opens_word: (pieces,) False for the second and later pieces of a word that was too long.
        blank: (pieces + 1,) pieces of white space before each piece, where the tokenizer's words add up, so that the
            others' estimates are exact and the true tokens of these are 0; None where the estimates are all there is.
    """

    starts: Offsets
    tokens: Offsets
    opens_word: NDArray[np.bool_]
    blank: Offsets | None = None

    def true_counts(self, text: str, spans: Sequence[tuple[int, int]]) -> list[int | None]:
        """Return the tokens of each span of `text`, whose words these are; None where they are not known exactly."""
        if self.blank is None:
            return [None] * len(spans)
        exact = self.tokens - self.blank
        # A word in pieces has another number of tokens than its pieces together.
        torn = np.zeros(len(self.starts), dtype=np.int64)
        np.cumsum(~self.opens_word, out=torn[1:])
        edges = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        pieces = np.searchsorted(self.starts, edges, side="right") - 1
        first, last = pieces[:, 0], pieces[:, 1]
        counts = (exact[last] - exact[first]).tolist()
        behind = self.starts[pieces].tolist()
        # Neither a torn word within nor one that an edge goes through; white space may be parted.
        whole = (torn[np.minimum(last + 1, len(torn) - 1)] == torn[first]).tolist()
        return [
            count if known and _blank(text, start_piece, start) and _blank(text, stop_piece, stop) else None
            for count, known, (start, stop), (start_piece, stop_piece) in zip(counts, whole, spans, behind, strict=True)
        ]


class WordCounter:
    """Splits text into words and estimates their tokens, remembering the words it has seen."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}
        self._adds_up = isinstance(tokenizer, AdditiveTokenizer) and tokenizer.words_add_up

    def measure(self, text: str) -> Words:
        """Return the words of `text`; words longer than 32 characters come in pieces, never cut inside a grapheme."""
        pattern = _pattern(text)
        words: list[str] = pattern.findall(text)
        lengths = list(map(len, words))
        adds_up = self._adds_up and pattern is _WORD and not _NO_SPACE.search(text)
        if max(lengths, default=0) <= _LONGEST_NON_ASCII:
            return self._measured(words, lengths, None, adds_up=adds_up)
        pieces, opens = _cut_long(words, lengths)
        return self._measured(pieces, list(map(len, pieces)), opens, adds_up=adds_up)

    def measure_graphemes(self, text: str) -> Words:
        """Return the grapheme clusters of `text` one by one, each tokenised apart."""
        graphemes = grapheme_runs(text, 1)
        return self._measured(graphemes, list(map(len, graphemes)), None)

    def measure_code_points(self, text: str) -> Words:
        """Return the code points of `text` one by one, each tokenised apart."""
        return self._measured(list(text), [1] * len(text), None)

    def _measured(
        self, words: list[str], lengths: list[int], opens: NDArray[np.bool_] | None, *, adds_up: bool = False
    ) -> Words:
        starts = _running_sum(lengths)
        tokens = _running_sum(self._counts(words))
        blank = _running_sum(list(map(str.isspace, words))) if adds_up else None
        return Words(starts, tokens, np.ones(len(words), dtype=np.bool_) if opens is None else opens, blank)

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


def _blank(text: str, start: int, stop: int) -> bool:
    return start == stop or text[start:stop].isspace()


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
