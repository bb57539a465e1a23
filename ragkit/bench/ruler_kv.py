"""Key-value retrieval: in one JSON object of random UUIDs, the value of a key is asked for.

Nothing in it says what will be asked for, and every record looks like every other, so it is the hardest test of what is
looked up in a long context. Source: Liu et al., Lost in the middle (arXiv 2307.03172), in the form of InfiniteBench
(arXiv 2402.13718) and SCBench (arXiv 2412.10319), which asks several questions of one document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ragkit.bench.haystacks import Draft, fitted
from ragkit.bench.long_items import CharSpan, LongItem, LongQuestion, Material
from ragkit.bench.long_scores import AnswerMetric
from ragkit.bench.words import draw_uuid

_NEW_TOKENS = 50
_SAMPLE = 64


@dataclass(frozen=True, slots=True)
class KeyValueTask:
    """Records of UUIDs, a line each; keys are asked for all over the document."""

    name: str = "kv_retrieval"

    def make(self, material: Material, length: int, index: int) -> LongItem:
        """Return what `LongTask.make` says."""
        chance = material.chance(self.name, index)
        places = [(at + chance.random()) / material.questions for at in range(material.questions)]
        asked = [(draw_uuid(chance), draw_uuid(chance)) for _ in places]
        drawn: list[tuple[str, str]] = []
        tokens_a_record = material.tokenizer.count_batch([_text(_records(chance, drawn, _SAMPLE))])[0] / _SAMPLE

        def assemble(wanted: float) -> Draft:
            records = list(_records(chance, drawn, int(wanted / tokens_a_record)))
            for place, record in zip(places, asked, strict=True):
                records.insert(round(place * len(records)), record)
            return Draft(_text(records), ())

        room = material.room(length, [_question(key, value, "") for key, value in asked], _NEW_TOKENS)
        fixed = material.tokenizer.count_batch([_text(asked)])[0]
        draft, tokens = fitted(assemble, room, material.tokenizer, fixed)
        questions = tuple(_question(key, value, draft.text) for key, value in asked)
        used = length - room + tokens
        return LongItem(self.name, length, index, draft.text, used, questions, AnswerMetric.VALUE, _NEW_TOKENS)


def _question(key: str, value: str, document: str) -> LongQuestion:
    gold: tuple[CharSpan, ...] = ()
    depth = 0.0
    if document:
        start = document.index(value, document.index(key))
        gold, depth = ((start, start + len(value)),), start / len(document)
    text = f'Which value does the JSON object give for the key "{key}"?'
    return LongQuestion(text, (value,), f'The value of "{key}" is "', gold, depth)


def _records(chance: Random, drawn: list[tuple[str, str]], count: int) -> Sequence[tuple[str, str]]:
    """Return the first `count` records that nobody asks for; they are drawn once."""
    while len(drawn) < count:
        drawn.append((draw_uuid(chance), draw_uuid(chance)))
    return drawn[:count]


def _text(records: Sequence[tuple[str, str]]) -> str:
    return json.dumps(dict(records), indent=0)
