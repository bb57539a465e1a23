"""RULER's two tasks of counting: the most common words of a list, and the most frequent coded words of a text.

Source: Hsieh et al., RULER (arXiv 2404.06654). Ten words stand 30 times among words that stand 3 times (6 and 1 in
documents of less than 4,096 tokens); coded words follow a Zipf distribution with exponent 2, whose first rank is a row
of dots that does not count. The wording is our own. Where the published generator runs out of words, pairs of words go
on, so that lists grow with the length; every document has a shuffle of its own.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from ragkit.bench.haystacks import Draft, fitted
from ragkit.bench.long_items import LongItem, LongQuestion, Material
from ragkit.bench.long_scores import AnswerMetric
from ragkit.bench.words import ADJECTIVES, NOUNS, pair

_SHORT = 4096  # tokens
_COMMON = 10
_TIMES, _TIMES_SHORT = (30, 3), (6, 1)  # common words, the others
_ASKED = 3  # coded words
_WORD_LETTERS = 6
_TOKENS_A_CODED_WORD = 50  # of the document, for each word of the code
_ZETA = math.pi**2 / 6  # of exponent 2
_DOTS = "..."
_SAMPLE = 256


@dataclass(frozen=True, slots=True)
class CommonWordsTask:
    """The ten most common words of a numbered list."""

    name: str = "cwe"
    max_new_tokens: int = 120

    def make(self, material: Material, length: int, index: int) -> LongItem:
        """Return what `LongTask.make` says."""
        chance = material.chance(self.name, index)
        words = _Words(chance)
        common = words.first(_COMMON)
        often, seldom = _TIMES_SHORT if length < _SHORT else _TIMES
        order = chance.random()
        sample = words.first(_COMMON + _SAMPLE)
        entry = material.tokenizer.count_batch(["".join(f"{10_000 + at}. {word}\n" for at, word in enumerate(sample))])
        tokens_a_word = entry[0] / len(sample)

        def assemble(wanted: float) -> Draft:
            others = max(0, int((wanted / tokens_a_word - _COMMON * often) / seldom))
            drawn = words.first(_COMMON + others)
            listed = drawn[:_COMMON] * often + drawn[_COMMON:] * seldom
            Random(order).shuffle(listed)
            return Draft("".join(f"{at}. {word}\n" for at, word in enumerate(listed, 1)), ())

        def question(gold: Sequence[tuple[int, int]], depth: float) -> LongQuestion:
            text = "Which ten words stand most often in the numbered list? Name these ten words."
            return LongQuestion(text, tuple(common), "The ten most common words of the list are", tuple(gold), depth)

        return _counted_item(self.name, material, length, index, self.max_new_tokens, assemble, question, " {}\n")


@dataclass(frozen=True, slots=True)
class CodedWordsTask:
    """The three most frequent words of a text in code, its dots aside."""

    name: str = "fwe"
    max_new_tokens: int = 50

    def make(self, material: Material, length: int, index: int) -> LongItem:
        """Return what `LongTask.make` says."""
        chance = material.chance(self.name, index)
        code = _code_words(chance, max(_ASKED + 1, length // _TOKENS_A_CODED_WORD))
        counts = material.tokenizer.count_batch([f" {word}" for word in (_DOTS, *code)])
        mean = sum(count / rank**2 for rank, count in enumerate(counts, 1)) / _ZETA
        order = chance.random()

        def assemble(wanted: float) -> Draft:
            total = wanted / mean
            text = [word for rank, word in enumerate((_DOTS, *code), 1) for _ in range(int(total / (_ZETA * rank**2)))]
            Random(order).shuffle(text)
            return Draft(" ".join(text), ())

        def question(gold: Sequence[tuple[int, int]], depth: float) -> LongQuestion:
            text = "The text is in code, and its dots mean nothing. Which three coded words stand in it most often?"
            return LongQuestion(text, code[:_ASKED], "The three most frequent coded words are", tuple(gold), depth)

        return _counted_item(self.name, material, length, index, self.max_new_tokens, assemble, question, "{}")


def _counted_item(
    name: str,
    material: Material,
    length: int,
    index: int,
    max_new_tokens: int,
    assemble: Callable[[float], Draft],
    question: Callable[[Sequence[tuple[int, int]], float], LongQuestion],
    form: str,
) -> LongItem:
    room = material.room(length, [question((), 0.0)], max_new_tokens)
    draft, tokens = fitted(assemble, room, material.tokenizer)
    asked = question((), 0.0)
    gold = [_first_place(draft.text, word, form) for word in asked.answers]
    asked = question(gold, min(start for start, _ in gold) / len(draft.text))
    used = length - room + tokens
    return LongItem(name, length, index, draft.text, used, (asked,), AnswerMetric.ALL, max_new_tokens)


def _first_place(text: str, word: str, form: str) -> tuple[int, int]:
    start = text.index(form.format(word)) + form.index("{")
    return start, start + len(word)


class _Words:
    """Words in random order without end: all single ones, then pairs that were not drawn before."""

    def __init__(self, chance: Random) -> None:
        self._words = sorted({*ADJECTIVES, *NOUNS})
        chance.shuffle(self._words)
        self._pairs: list[int] | None = None
        self._chance = Random(chance.random())

    def first(self, count: int) -> list[str]:
        """Return the first `count` words; a list ends where there are no more pairs."""
        if count > len(self._words) and self._pairs is None:
            self._pairs = list(range(len(ADJECTIVES) * len(NOUNS)))
            self._chance.shuffle(self._pairs)
        missing = max(0, count - len(self._words))
        return self._words[:count] + [pair(number) for number in (self._pairs or [])[:missing]]


def _code_words(chance: Random, count: int) -> tuple[str, ...]:
    """Return `count` different words of six letters."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(chance.choices(string.ascii_lowercase, k=_WORD_LETTERS))] = None
    return tuple(words)
