"""The classic test: a sentence at a known depth of running text, for every length and depth.

Source: Kamradt's needle in a haystack, with what its later users changed: the needle is random, so that no model knows
it; it stands between sentences; and its depth is a share of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ragkit.bench.haystacks import Needle, fitted, insert
from ragkit.bench.long_items import LongItem, LongQuestion, Material
from ragkit.bench.long_scores import AnswerMetric
from ragkit.bench.ruler_niah import Kind, draw_values, needle_question, needle_text
from ragkit.bench.words import draw_keys

TASK = "needle"
_NEW_TOKENS = 32


def spaced_depths(count: int) -> tuple[float, ...]:
    """Return `count` depths from the beginning to the end, evenly spaced; the middle where there is but one."""
    return (0.5,) if count == 1 else tuple(at / (count - 1) for at in range(count))


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """Documents with one needle each, or with one at every depth, each of which has a question.

    Attributes:
        depths: as shares of the document's tokens.
        together: all depths in one document, so that it is read once for all of them.
    """

    depths: Sequence[float]
    together: bool = False

    @property
    def name(self) -> str:
        """The name in results."""
        return TASK

    @property
    def documents(self) -> int:
        """How many documents a round of all depths takes."""
        return 1 if self.together else len(self.depths)

    def make(self, material: Material, length: int, index: int) -> LongItem:
        """Return what `LongTask.make` says: documents are counted over the depths, then over the needles."""
        if self.together:
            return _item(material, length, index, self.depths)
        return _item(material, length, index, [self.depths[index % len(self.depths)]])


def _item(material: Material, length: int, index: int, depths: Sequence[float]) -> LongItem:
    chance = material.chance(TASK, index)
    keys = draw_keys(chance, len(depths))
    values = draw_values(chance, Kind.NUMBER, len(depths))
    haystack = material.prose.starting_at(chance.random())
    needles = [
        Needle(needle_text(key, Kind.NUMBER, value), depth)
        for key, value, depth in zip(keys, values, depths, strict=True)
    ]

    def questions(starts: Sequence[int]) -> Iterator[LongQuestion]:
        for key, value, needle, start in zip(keys, values, needles, starts, strict=True):
            at = start + needle.text.rindex(value)
            yield needle_question([key], Kind.NUMBER, [value], [(at, at + len(value))], needle.depth)

    room = material.room(length, list(questions([0] * len(depths))), _NEW_TOKENS)
    draft, tokens = fitted(
        lambda wanted: insert(haystack.take(wanted), needles, before=" ", after=""),
        room,
        material.tokenizer,
        sum(material.tokenizer.count_batch([needle.text for needle in needles])),
    )
    asked = tuple(questions(draft.starts))
    return LongItem(TASK, length, index, draft.text, length - room + tokens, asked, AnswerMetric.ALL, _NEW_TOKENS)
