"""What an evaluation over long documents found: every answer, and means by strategy, task, length and depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ragkit.bench.bootstrap import mean_bootstrap, paired_bootstrap
from ragkit.bench.chunking_tables import Difference

ALL_TASKS = "mean of tasks"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer.

    Attributes:
        strategy, task, length, index: what answered, and to which document of which task.
        number: which of the document's questions it was.
        depth: where the answer stands, as a share of the document.
        tokens: document, question and answer.
        question, answers, text: what was asked, what should and what was said.
        score: from 0 to 1.
        gold_shown: share of the spans with the answer that the model had before it.
        prompt_tokens, document_seconds, seconds: as in `LongAnswer`.
    """

    strategy: str
    task: str
    length: int
    index: int
    number: int
    depth: float
    tokens: int
    question: str
    answers: tuple[str, ...]
    text: str
    score: float
    gold_shown: float
    prompt_tokens: int
    document_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """The mean of one strategy over one task (or all of them, each with equal weight) at one length.

    Attributes:
        questions: how many were answered.
        score, low, high: percent, and its 95% interval by a bootstrap over the questions of each task.
        against_first: percent above the first strategy on the questions that both answered; absent for that itself,
            and where there are none.
        gold_shown: percent of the answers' spans that the model had before it.
        prompt_tokens, document_seconds, seconds: means.
    """

    strategy: str
    task: str
    length: int
    questions: int
    score: float
    low: float
    high: float
    against_first: Difference | None
    gold_shown: float
    prompt_tokens: float
    document_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class HeatCell:
    """The mean score in percent of one strategy at one length, in one row of its heat map: a depth or a task."""

    strategy: str
    row: str
    length: int
    score: float
    questions: int


@dataclass(frozen=True, slots=True)
class LongReport:
    """What was measured.

    Attributes:
        rows: means, in order of strategy, task and length.
        cells: the heat maps.
        outcomes: every answer.
        notes: what was left out, and why.
        settings: what it was run with.
        seconds: how long it took.
    """

    rows: Sequence[ScoreRow]
    cells: Sequence[HeatCell]
    outcomes: Sequence[Outcome]
    notes: Sequence[str]
    settings: Mapping[str, Any]
    seconds: float


def score_rows(outcomes: Sequence[Outcome]) -> list[ScoreRow]:
    """Return a row for every strategy, task and length, and where there are several tasks one for their mean."""
    strategies = list(dict.fromkeys(one.strategy for one in outcomes))
    tasks = list(dict.fromkeys(one.task for one in outcomes))
    lengths = sorted({one.length for one in outcomes})
    rows = []
    for strategy in strategies:
        for task in [*tasks, *([ALL_TASKS] if len(tasks) > 1 else [])]:
            for length in lengths:
                some = [one for one in outcomes if one.length == length and task in (one.task, ALL_TASKS)]
                own = [one for one in some if one.strategy == strategy]
                if own and (task != ALL_TASKS or len({one.task for one in own}) == len(tasks)):
                    first = [] if strategy == strategies[0] else [one for one in some if one.strategy == strategies[0]]
                    rows.append(_row(strategy, task, length, own, first))
    return rows


def depth_cells(outcomes: Sequence[Outcome]) -> list[HeatCell]:
    """Return a heat map's cells by depth, from the beginning of the documents down."""
    return _cells(sorted(outcomes, key=lambda one: one.depth), lambda one: f"{100 * one.depth:.0f}%")


def task_cells(outcomes: Sequence[Outcome]) -> list[HeatCell]:
    """Return a heat map's cells by task."""
    return _cells(outcomes, lambda one: one.task)


def _cells(outcomes: Iterable[Outcome], row_of: Any) -> list[HeatCell]:
    groups: dict[tuple[str, str, int], list[float]] = {}
    for one in outcomes:
        groups.setdefault((one.strategy, row_of(one), one.length), []).append(one.score)
    return [HeatCell(*key, 100 * float(np.mean(scores)), len(scores)) for key, scores in groups.items()]


def _row(strategy: str, task: str, length: int, own: Sequence[Outcome], first: Sequence[Outcome]) -> ScoreRow:
    by_task = _by_task(own)
    score, low, high = mean_bootstrap([[one.score for one in some] for some in by_task.values()])
    return ScoreRow(
        strategy=strategy,
        task=task,
        length=length,
        questions=len(own),
        score=100 * score,
        low=100 * low,
        high=100 * high,
        against_first=_against(own, first),
        gold_shown=100 * _mean(by_task, "gold_shown"),
        prompt_tokens=_mean(by_task, "prompt_tokens"),
        document_seconds=_mean(by_task, "document_seconds"),
        seconds=_mean(by_task, "seconds"),
    )


def _against(own: Sequence[Outcome], first: Sequence[Outcome]) -> Difference | None:
    theirs = {(one.task, one.index, one.number): one.score for one in first}
    pairs = [(one.score, theirs[key]) for one in own if (key := (one.task, one.index, one.number)) in theirs]
    if not pairs:
        return None
    mean, low, high = paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs])
    return Difference(100 * mean, 100 * low, 100 * high)


def _by_task(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.task, []).append(one)
    return groups


def _mean(by_task: Mapping[str, Sequence[Outcome]], name: str) -> float:
    return float(np.mean([np.mean([getattr(one, name) for one in some]) for some in by_task.values()]))
