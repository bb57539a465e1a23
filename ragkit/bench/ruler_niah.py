"""RULER's eight needle tasks: keys with values somewhere in running text, in lines of noise, or among other needles.

Source: Hsieh et al., RULER (arXiv 2404.06654), table of task configurations; the wording is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from random import Random

from ragkit.bench.haystacks import NOISE, Draft, Haystack, Needle, NoiseLines, Pieces, fitted, insert
from ragkit.bench.long_items import LongItem, LongQuestion, Material
from ragkit.bench.long_scores import AnswerMetric
from ragkit.bench.words import ADJECTIVES, NOUNS, draw_keys, draw_uuid, pair
from ragkit.types import TextTokenizer

_DEPTHS = 40  # places, evenly spaced from the beginning to the end, that needles are drawn for
_SAMPLE = 64  # needles tokenised to know how long one is
_NEW_TOKENS = 128


class Surroundings(StrEnum):
    """What needles lie in."""

    NOISE = "noise"
    PROSE = "prose"
    NEEDLES = "needles"


class Kind(StrEnum):
    """What keys and values look like."""

    WORDS = "words"
    NUMBER = "number"
    UUID = "UUID"


def needle_text(key: str, kind: Kind, value: str) -> str:
    """Return the sentence that gives a key its value."""
    return f"Keep in mind that the secret {kind} of {key} is {value}."


def needle_question(
    keys: Sequence[str], kind: Kind, values: Sequence[str], gold: Sequence[tuple[int, int]], depth: float
) -> LongQuestion:
    """Return the question for all `values` of `keys`."""
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    if len(values) == 1:
        asked, begun = f"What is the secret {kind} of {named}?", f"The secret {kind} of {named} is"
    else:
        asked = f"What are all the secret {kind}s of {named}? Name every one that the text gives."
        begun = f"The secret {kind}s of {named} are"
    return LongQuestion(asked, tuple(values), begun, tuple(gold), depth)


def draw_values(chance: Random, kind: Kind, count: int) -> list[str]:
    """Return `count` different values: numbers of seven digits, or UUIDs."""
    if kind is Kind.UUID:
        return [draw_uuid(chance) for _ in range(count)]
    return [str(value) for value in chance.sample(range(1_000_000, 10_000_000), count)]


@dataclass(frozen=True, slots=True)
class NiahTask:
    """Needles in a haystack.

    Attributes:
        name: the name that `--tasks` takes.
        surroundings: what the needles lie in.
        keys, values: how many keys there are besides those of the haystack, and how many values each has.
        queries: how many keys one question asks for.
        key_kind, value_kind: what they look like.
    """

    name: str
    surroundings: Surroundings
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: Kind = Kind.WORDS
    value_kind: Kind = Kind.NUMBER

    def make(self, material: Material, length: int, index: int) -> LongItem:
        """Return what `LongTask.make` says; only among needles does a document get more than one question."""
        chance = material.chance(self.name, index)
        questions = material.questions if self.surroundings is Surroundings.NEEDLES else 1
        keys = self._draw_keys(chance, max(self.keys, self.queries, questions))
        values = {key: draw_values(chance, self.value_kind, self.values) for key in keys}
        placed = [(key, value) for key in keys for value in values[key]]
        needles = [
            Needle(needle_text(key, self.value_kind, value), depth)
            for (key, value), depth in zip(placed, _depths(chance, len(placed)), strict=True)
        ]
        haystack = self._haystack(material, chance, frozenset(keys))
        ask = partial(self._questions, keys, values, placed, needles, 1 if self.queries > 1 else questions)
        room = material.room(length, ask(None), _NEW_TOKENS)
        between = (" ", "") if self.surroundings is Surroundings.PROSE else ("", "\n")
        draft, tokens = fitted(
            lambda wanted: insert(haystack.take(wanted), needles, before=between[0], after=between[1]),
            room,
            material.tokenizer,
            sum(material.tokenizer.count_batch([needle.text for needle in needles])),
        )
        used = length - room + tokens
        return LongItem(
            self.name, length, index, draft.text, used, tuple(ask(draft)), AnswerMetric.ALL, _NEW_TOKENS
        )  # fmt: skip

    def _draw_keys(self, chance: Random, count: int) -> list[str]:
        return (
            draw_keys(chance, count) if self.key_kind is Kind.WORDS else draw_values(chance, self.key_kind, count)
        )  # fmt: skip

    def _haystack(self, material: Material, chance: Random, keys: frozenset[str]) -> Haystack:
        if self.surroundings is Surroundings.PROSE:
            return material.prose.starting_at(chance.random())
        if self.surroundings is Surroundings.NOISE:
            return NoiseLines(material.tokenizer.count_batch([NOISE * _SAMPLE])[0] / _SAMPLE)
        return OtherNeedles(chance, self.key_kind, self.value_kind, keys, material.tokenizer)

    def _questions(
        self,
        keys: Sequence[str],
        values: dict[str, list[str]],
        placed: Sequence[tuple[str, str]],
        needles: Sequence[Needle],
        count: int,
        draft: Draft | None,
    ) -> list[LongQuestion]:
        """Return the questions; before there is a document, without places."""
        asked = [keys[at : at + 1] for at in range(count)] if self.queries == 1 else [keys[: self.queries]]
        found = []
        for some in asked:
            wanted = [at for at, (key, _) in enumerate(placed) if key in some]
            spans = [] if draft is None else [_value_span(draft, at, needles[at], placed[at][1]) for at in wanted]
            depth = 0.0 if draft is None else min(start for start, _ in spans) / len(draft.text)
            found.append(
                needle_question(some, self.value_kind, [value for key in some for value in values[key]], spans, depth)
            )
        return found


@dataclass(slots=True)
class OtherNeedles:
    """A haystack of needles that nobody asks for; none has one of `keys`.

    They are drawn one after the other as they are needed, so that a longer haystack begins as a shorter one.
    """

    chance: Random
    key_kind: Kind
    value_kind: Kind
    keys: frozenset[str]
    tokenizer: TextTokenizer
    _lines: list[str] = field(default_factory=list)
    _mean: float = 0.0

    def take(self, tokens: float) -> Pieces:
        """Return what `Haystack.take` says, by the mean length of a few of them."""
        if not self._mean:
            self._draw(_SAMPLE)
            self._mean = self.tokenizer.count_batch(["".join(self._lines)])[0] / _SAMPLE
        count = int(tokens / self._mean)
        self._draw(count)
        return Pieces(self._lines[:count], [self._mean] * count)

    def _draw(self, count: int) -> None:
        pairs = len(ADJECTIVES) * len(NOUNS)
        while len(self._lines) < count:
            by_words = self.key_kind is Kind.WORDS
            key = pair(self.chance.randrange(pairs)) if by_words else draw_uuid(self.chance)
            if key not in self.keys:
                [value] = draw_values(self.chance, self.value_kind, 1)
                self._lines.append(needle_text(key, self.value_kind, value) + "\n")


def _depths(chance: Random, count: int) -> list[float]:
    if count > _DEPTHS:
        return [chance.random() for _ in range(count)]
    return [place / (_DEPTHS - 1) for place in chance.sample(range(_DEPTHS), count)]


def _value_span(draft: Draft, at: int, needle: Needle, value: str) -> tuple[int, int]:
    start = draft.starts[at] + needle.text.rindex(value)
    return start, start + len(value)


NIAH_TASKS = (
    NiahTask("niah_single_1", Surroundings.NOISE),
    NiahTask("niah_single_2", Surroundings.PROSE),
    NiahTask("niah_single_3", Surroundings.PROSE, value_kind=Kind.UUID),
    NiahTask("niah_multikey_1", Surroundings.PROSE, keys=4),
    NiahTask("niah_multikey_2", Surroundings.NEEDLES),
    NiahTask("niah_multikey_3", Surroundings.NEEDLES, key_kind=Kind.UUID, value_kind=Kind.UUID),
    NiahTask("niah_multivalue", Surroundings.PROSE, values=4),
    NiahTask("niah_multiquery", Surroundings.PROSE, keys=4, queries=4),
)
