"""RULER's two tasks of questions over passages: the answer in one of them, and in several taken together.

Source: Hsieh et al., RULER (arXiv 2404.06654): SQuAD and HotpotQA, gold passages among others, shuffled. Here a folder
of public data gives ruler/derived/squad.json, or questions of MuSiQue with their own passages; more passages come from
2WikiMultihopQA's corpus. Without it, and where that ends, people and towns are made up. Every document has a shuffle of
its own, and no passage stands in it twice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ragkit.bench.drawn_texts import DrawnTexts
from ragkit.bench.haystacks import Needle, Pieces, TooShortError, fitted, insert
from ragkit.bench.long_items import LongItem, LongQuestion, Material
from ragkit.bench.long_scores import AnswerMetric
from ragkit.bench.made_facts import made_passages, made_questions
from ragkit.bench.musique import FILE_NAME, musique_items
from ragkit.bench.prose import wiki_passages
from ragkit.errors import UsageError

_NEW_TOKENS = 32
_BATCH = 512  # passages tokenised at once
_SEARCHED, _LAST = 200, 3  # passages among which the last ones of a document are looked for, and how many those are
_SPARE = 8  # tokens that a passage may take besides its text
_MADE = 200  # questions to draw from where there are no public ones


@dataclass(frozen=True, slots=True)
class PassageQuestion:
    """A question with the passages that answer it, and those that must stand beside them."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QuestionPool:
    """Questions, and passages without end that belong to none of them."""

    questions: Sequence[PassageQuestion]
    others: Iterator[str]


@dataclass(frozen=True, slots=True)
class PassagesTask:
    """Questions over passages; `hops` is how many of them an answer takes: 1 or 2, which stands for several."""

    name: str
    hops: int

    def make(self, material: Material, length: int, index: int) -> LongItem:
        """Return what `LongTask.make` says; only questions whose own passages fit are drawn."""
        passages = material.kept(self.name, lambda: _Passages(self.name, self.hops, material))
        chance = material.chance(self.name, index)
        asked = passages.question(index, length - material.frame_tokens - _NEW_TOKENS)
        room = material.room(length, [_question(asked, "")], _NEW_TOKENS)
        own = [Needle(_passage(text), chance.random()) for text in (*asked.gold, *asked.beside)]
        order = chance.random()
        draft, tokens = fitted(
            lambda wanted: insert(passages.take(wanted, Random(order), asked), own, before="", after=""),
            room,
            material.tokenizer,
            sum(material.tokenizer.count_batch([needle.text for needle in own])),
        )
        questions = (_question(asked, draft.text),)
        used = length - room + tokens
        return LongItem(self.name, length, index, draft.text, used, questions, AnswerMetric.PART, _NEW_TOKENS)


class _Passages:
    """A pool's questions in random order, and its passages, tokenised as far as they were needed."""

    def __init__(self, name: str, hops: int, material: Material) -> None:
        pool = _pool(material.data, hops)
        self._questions = list(pool.questions)
        material.chance(name).shuffle(self._questions)
        count = material.tokenizer.count_batch
        self._own_tokens = [sum(count([*one.gold, *one.beside])) for one in self._questions]
        gold = (text for question in self._questions for text in question.gold)
        source = map(_passage, itertools.chain(dict.fromkeys(gold), pool.others))
        self._drawn = DrawnTexts((), source, count, _BATCH)

    def question(self, index: int, room: int) -> PassageQuestion:
        """Return question `index` of those whose passages leave some of `room` to others."""
        fitting = [
            one
            for one, tokens in zip(self._questions, self._own_tokens, strict=True)
            if tokens + _SPARE * len([*one.gold, *one.beside]) < room
        ]
        if not fitting:
            raise TooShortError(
                f"the questions' own passages take at least {min(self._own_tokens):,} tokens, and there is room for "
                f"{room:,}"
            )
        return fitting[index % len(fitting)]

    def take(self, tokens: float, chance: Random, asked: PassageQuestion) -> Pieces:
        """Return about `tokens` tokens of passages that the question does not bring itself, in random order."""
        texts, counts = self._drawn.texts, self._drawn.counts
        own = {_passage(text) for text in (*asked.gold, *asked.beside)}
        chosen: list[int] = []
        rest, at = tokens, 0
        while self._at(at) in own or counts[at] <= rest:
            if texts[at] not in own:
                chosen.append(at)
                rest -= counts[at]
            at += 1
        if chosen:
            rest += counts[chosen.pop()]
        self._at(at + _SEARCHED)
        for _ in range(_LAST):  # what fills the rest best, instead of the next
            fitting = [
                (counts[other], -other)
                for other in range(at, at + _SEARCHED)
                if counts[other] <= rest and other not in chosen[-_LAST:] and texts[other] not in own
            ]
            if fitting:
                count, other = max(fitting)
                chosen.append(-other)
                rest -= count
        chance.shuffle(chosen)
        return Pieces([texts[at] for at in chosen], [counts[at] for at in chosen])

    def _at(self, number: int) -> str:
        """Return a passage; what has not been read up to it is read and tokenised now."""
        self._drawn.draw(number + 1)
        return self._drawn.texts[number]


def _passage(text: str) -> str:
    return f"Passage. {' '.join(text.split())}\n\n"


def _question(asked: PassageQuestion, document: str) -> LongQuestion:
    """Return the question; where there is a document, with the first place of each answer in a gold passage."""
    places: list[tuple[int, int]] = []
    for gold in (_passage(text) for text in asked.gold if document):
        start = document.index(gold)
        found = [(gold.lower().find(answer.lower()), len(answer)) for answer in asked.answers]
        places += [(start + at, start + at + size) for at, size in found if at >= 0]
    depth = min(start for start, _ in places) / len(document) if document else 0.0
    return LongQuestion(asked.text, asked.answers, "The answer is", tuple(dict.fromkeys(places)), depth)


def _pool(data: Path | None, hops: int) -> QuestionPool:
    """Return the public questions of `data` where it holds them, else made ones.

    Raises:
        UsageError: the files are not as published.
    """
    path = None if data is None else data / ("ruler/derived/squad.json" if hops == 1 else f"musique/{FILE_NAME}")
    if data is None or path is None or not path.is_file():
        made = made_questions(0, _MADE, hops)
        return QuestionPool([PassageQuestion(one.text, (one.answer,), one.passages) for one in made], made_passages(0))
    try:
        questions = _squad(path) if hops == 1 else _musique(path.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} does not hold questions as published: {type(error).__name__}: {error}") from error
    return QuestionPool(questions, itertools.chain(wiki_passages(data), made_passages(0)))


def _squad(path: Path) -> list[PassageQuestion]:
    return [
        PassageQuestion(one["question"], tuple(dict.fromkeys(a["text"] for a in one["answers"])), (part["context"],))
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for part in article["paragraphs"]
        for one in part["qas"]
        if not one.get("is_impossible")
    ]


def _musique(folder: Path) -> list[PassageQuestion]:
    """Return the questions whose answer stands in a passage as it is written."""
    found = []
    for item in musique_items(folder):
        holds = [any(answer.lower() in text.lower() for answer in item.answers) for text in item.passages]
        gold = tuple(text for text, has in zip(item.passages, holds, strict=True) if has)
        beside = tuple(text for text, has in zip(item.passages, holds, strict=True) if not has)
        if gold:
            found.append(PassageQuestion(item.question, item.answers, gold, beside))
    return found


QA_TASKS = (PassagesTask("qa_1", 1), PassagesTask("qa_2", 2))
