"""RULER's variable tracking: which variables have a value, by a chain of assignments that is hidden in noise.

Source: Hsieh et al., RULER (arXiv 2404.06654): one chain of four hops, five names. The wording is our own; the worked
example stands in the question, so that the document does not depend on it.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from ragkit.bench.haystacks import NOISE, Needle, NoiseLines, fitted, insert
from ragkit.bench.long_items import LongItem, LongQuestion, Material
from ragkit.bench.long_scores import AnswerMetric

_HOPS, _LETTERS = 4, 5
_NEW_TOKENS = 30
_SAMPLE = 64  # lines of noise tokenised to know how long one is
_EXAMPLE = (
    "Where a text says that variable FIG is 31 and that variable OAK is what variable FIG is, the variables with the "
    "value 31 are FIG and OAK."
)


@dataclass(frozen=True, slots=True)
class VariablesTask:
    """Variable tracking over lines of noise."""

    name: str = "vt"

    def make(self, material: Material, length: int, index: int) -> LongItem:
        """Return what `LongTask.make` says."""
        chance = material.chance(self.name, index)
        names = _names(chance, _HOPS + 1)
        value = str(chance.randrange(10_000, 100_000))
        lines = [f"Variable {names[0]} is {value}."]
        lines += [f"Variable {name} is what variable {before} is." for before, name in pairwise(names)]
        needles = [
            Needle(line, depth) for line, depth in zip(lines, sorted(chance.random() for _ in lines), strict=True)
        ]
        noise = NoiseLines(material.tokenizer.count_batch([NOISE * _SAMPLE])[0] / _SAMPLE)
        room = material.room(length, [_question(names, value, (), 0.0)], _NEW_TOKENS)
        draft, tokens = fitted(
            lambda wanted: insert(noise.take(wanted), needles, before="", after="\n"),
            room,
            material.tokenizer,
            sum(material.tokenizer.count_batch(lines)),
        )
        first = len("Variable ")
        gold = tuple((start + first, start + first + _LETTERS) for start in draft.starts)
        question = _question(names, value, gold, gold[0][0] / len(draft.text))
        used = length - room + tokens
        return LongItem(self.name, length, index, draft.text, used, (question,), AnswerMetric.ALL, _NEW_TOKENS)


def _question(names: Sequence[str], value: str, gold: Sequence[tuple[int, int]], depth: float) -> LongQuestion:
    text = f"{_EXAMPLE} Which {len(names)} variables of the text have the value {value}?"
    begun = f"The {len(names)} variables of the text with the value {value} are called"
    return LongQuestion(text, tuple(names), begun, tuple(gold), depth)


def _names(chance: Random, count: int) -> list[str]:
    """Return `count` different names of five capitals."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(chance.choices(string.ascii_uppercase, k=_LETTERS))] = None
    return list(names)
