"""Runs questions about long documents past every way of answering them, and keeps what is done at any time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ragkit.bench.haystacks import TooShortError
from ragkit.bench.long_answers import LongAnswer, LongContextAnswerer
from ragkit.bench.long_items import CharSpan, LongItem, LongQuestion, LongTask, Material
from ragkit.bench.long_report import HeatCell, LongReport, Outcome, score_rows
from ragkit.bench.long_scores import score
from ragkit.bench.watch import Watch
from ragkit.errors import RagkitError
from ragkit.progress import Progress

_KEPT_EVERY_S = 10.0  # at least, between two reports of what is done: a report with its intervals takes a while


@dataclass(frozen=True, slots=True)
class LongPlan:
    """What is asked.

    Attributes:
        tasks: what makes the documents.
        lengths: in tokens, ascending.
        rounds: the indices of the documents of each round; every round is done at every length before the next.
        time_limit_s: no document is begun to be read after so many seconds.
    """

    tasks: Sequence[LongTask]
    lengths: Sequence[int]
    rounds: Sequence[Sequence[int]]
    time_limit_s: float = math.inf


class LongContextEval:
    """One evaluation. `report` gives what is done, also after `run` was interrupted.

    Args:
        plan: what is asked.
        material: what documents are made of.
        answerers: what answers, the one that others are compared with first. For every document they are called one
            after the other, so those that share what reading it gave need to keep one document only.
        cells: makes the heat maps.
        settings: goes into the report.
        keep: is given what is done, now and then and when the run ends: what ends the process loses the rest alone.
    """

    def __init__(
        self,
        plan: LongPlan,
        material: Material,
        answerers: Sequence[LongContextAnswerer],
        cells: Callable[[Sequence[Outcome]], list[HeatCell]],
        settings: Mapping[str, Any],
        keep: Callable[[LongReport], object] | None = None,
    ) -> None:
        self._plan = plan
        self._material = material
        self._answerers = answerers
        self._cells = cells
        self._settings = settings
        self._keep = keep
        self._kept = 0  # answers of the last report
        self._outcomes: list[Outcome] = []
        self._notes: dict[str, None] = {}
        self._refused: set[tuple[str, int]] = set()
        self._started = self._reported = self._seconds = 0.0

    def run(self, progress: Progress) -> None:
        """Ask everything, or go on until an exception ends it.

        Raises:
            UsageError: the folder of public data does not hold what it should.
        """
        watch = Watch(progress, self._plan.time_limit_s)
        self._started = self._reported = time.perf_counter()
        documents = self._documents()
        total = len(documents) * len(self._answerers)
        watch.start(total, "readings of documents")
        try:
            for number, (task, length, index) in enumerate(documents):
                done = self._ask(task, length, index, watch)
                if done < len(self._answerers):
                    left = total - number * len(self._answerers) - done
                    self._note(f"the time limit left out {left} of {total} readings of documents")
                    break
        finally:
            self._keep_done(0.0)

    def report(self) -> LongReport:
        """Return what is done."""
        order = {answerer.name: place for place, answerer in enumerate(self._answerers)}
        outcomes = sorted(self._outcomes, key=lambda one: order[one.strategy])
        return LongReport(
            score_rows(outcomes), self._cells(outcomes), outcomes, list(self._notes), self._settings, self._seconds
        )

    def _documents(self) -> list[tuple[LongTask, int, int]]:
        plan = self._plan
        return [
            (task, length, index)
            for indices in plan.rounds
            for length in plan.lengths
            for task, index in itertools.product(plan.tasks, indices)
        ]

    def _ask(self, task: LongTask, length: int, index: int, watch: Watch) -> int:
        """Return how many answerers had their turn before the time was over."""
        willing = [answerer for answerer in self._answerers if self._takes(answerer, length)]
        item: LongItem | None = None
        for turn, answerer in enumerate(self._answerers):
            if self._outcomes and watch.is_over:
                return turn
            if answerer in willing:
                item = item or self._make(task, length, index)
                if item is None:
                    willing = []
                else:
                    self._answer(answerer, item)
                    self._keep_done(_KEPT_EVERY_S)
            watch.step()
        return len(self._answerers)

    def _takes(self, answerer: LongContextAnswerer, length: int) -> bool:
        if answerer.most_tokens and length > answerer.most_tokens:
            self._note(
                f"{answerer.name} was not asked at {length:,} tokens: it takes {answerer.most_tokens:,} at most, the "
                "model's window"
            )
            return False
        return (answerer.name, length) not in self._refused

    def _make(self, task: LongTask, length: int, index: int) -> LongItem | None:
        try:
            return task.make(self._material, length, index)
        except TooShortError as error:
            self._note(f"{task.name} was left out at {length:,} tokens: {error}")
            return None

    def _answer(self, answerer: LongContextAnswerer, item: LongItem) -> None:
        answers = answerer.answer(item.document, item.questions, item.max_new_tokens)
        try:
            for number, (question, answer) in enumerate(zip(item.questions, answers, strict=True)):
                self._outcomes.append(_outcome(answerer.name, item, number, question, answer))
        except (RagkitError, MemoryError, torch.OutOfMemoryError) as error:
            self._refused.add((answerer.name, item.length))
            why = error if isinstance(error, RagkitError) else "memory ended"
            self._note(f"{answerer.name} gave up at {item.length:,} tokens: {why}")

    def _keep_done(self, after_s: float) -> None:
        """Give away what is done, if there is more than before and so much time has gone by."""
        now = time.perf_counter()
        self._seconds = now - self._started
        if self._keep is None or len(self._outcomes) == self._kept or now - self._reported < after_s:
            return
        self._kept, self._reported = len(self._outcomes), now
        self._keep(self.report())

    def _note(self, text: str) -> None:
        self._notes[text] = None


def _outcome(strategy: str, item: LongItem, number: int, question: LongQuestion, answer: LongAnswer) -> Outcome:
    return Outcome(
        strategy=strategy,
        task=item.task,
        length=item.length,
        index=item.index,
        number=number,
        depth=question.depth,
        tokens=item.tokens,
        question=question.text,
        answers=question.answers,
        text=answer.text,
        score=score(item.metric, answer.text, question.answers),
        gold_shown=_share_shown(question.gold, answer.shown),
        prompt_tokens=answer.prompt_tokens,
        document_seconds=answer.document_seconds,
        seconds=answer.seconds,
    )


def _share_shown(gold: Sequence[CharSpan], shown: Sequence[CharSpan]) -> float:
    """Return the share of `gold` spans that lie whole in one of `shown`."""
    held = [any(start <= first and last <= stop for start, stop in shown) for first, last in gold]
    return sum(held) / len(held) if held else 0.0
