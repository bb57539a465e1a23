"""The tables of the chunking evaluation: chunkers at equal retrieved characters, Chroma's rows, and the frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ragkit.bench.bootstrap import paired_bootstrap
from ragkit.bench.chunking_rankings import Mode, Ranking
from ragkit.bench.chunking_variants import BASELINE
from ragkit.bench.question_sets import Metric, QuestionSet, chroma_characters
from ragkit.bench.spans import Span, recall_and_iou, whole_share

Run: TypeAlias = tuple[str, int]  # the chunker's name and its cap in tokens
Runs: TypeAlias = Mapping[Run, Ranking]
_Scores: TypeAlias = Mapping[tuple[Run, Mode], Sequence[float]]

# The table of Chroma's report for all-MiniLM-L6-v2 (Smith and Troynikov, Evaluating Chunking Strategies for Retrieval,
# 2024), five chunks retrieved: chunker, mean tokens of a chunk, recall, IoU.
CHROMA_ROWS = (
    ("Recursive 250/125", 180, 78.7, 4.9),
    ("TokenText 250/125", 250, 82.4, 3.5),
    ("Recursive 250", 162, 78.5, 5.4),
    ("TokenText 250", 250, 77.1, 3.3),
    ("Recursive 200", 128, 75.7, 6.5),
    ("TokenText 200", 200, 76.6, 4.1),
    ("Cluster 250", 168, 77.3, 6.0),
    ("Cluster 200", 102, 75.2, 7.2),
)
CHROMA_QUESTIONS = 472
_NEAR = (0.95, 1.0, 1.05)  # of a published row's characters: where recall and IoU are largest within 5% of them
_FRONTIER = (0.25, 0.5, 1.0, 2.0, 4.0)  # budgets of the frontier as multiples of the set's own


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference in points, and its 95% interval by a paired bootstrap over the questions."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One chunker under one cap on one set.

    Attributes:
        data: name of the set.
        chunker, cap: what was run.
        chunks, mean_characters: how many it made, and how long.
        characters: the budget of every question.
        metric: what the scores are.
        scores: percent by mode.
        against_baseline: differences to `BASELINE` under the same cap, by mode; empty for itself and where it was not
            run.
        first_chunk: hit at 1 without a budget, percent by mode: the answers that the first chunk holds whole.
        first_chunk_against_baseline: its differences.
    """

    data: str
    chunker: str
    cap: int
    chunks: int
    mean_characters: float
    characters: int
    metric: Metric
    scores: Mapping[Mode, float]
    against_baseline: Mapping[Mode, Difference]
    first_chunk: Mapping[Mode, float]
    first_chunk_against_baseline: Mapping[Mode, Difference]


@dataclass(frozen=True, slots=True)
class Best:
    """The best of some runs: its score in percent, whose it is, and at how many characters."""

    score: float
    by: str
    characters: int


@dataclass(frozen=True, slots=True)
class ChromaRow:
    """One row of Chroma's table, and the best of the dense runs at its characters; scores in percent.

    Attributes:
        name: the row's name.
        characters: what it retrieves on average.
        their_recall, their_iou: what was published.
        our_recall, our_iou: the best dense runs at `characters`.
        by_recall, by_iou: which these are.
        near_recall, near_iou: the best dense runs at up to 5% fewer or more characters.
        hybrid_recall, hybrid_iou: the best hybrid runs at `characters`; the published ones are dense.
    """

    name: str
    characters: int
    their_recall: float
    our_recall: float
    by_recall: str
    their_iou: float
    our_iou: float
    by_iou: str
    near_recall: Best
    near_iou: Best
    hybrid_recall: Best
    hybrid_iou: Best


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """What one run scores at one budget; recall, IoU and hit in percent."""

    data: str
    chunker: str
    cap: int
    mode: Mode
    characters: int
    recall: float
    iou: float
    hit: float


def comparison(data: QuestionSet, runs: Runs) -> list[ComparisonRow]:
    """Return every run's mean scores at the set's budget, and the differences to the baseline under the same cap."""
    scores = {(run, mode): _scores(data, ranking, mode) for run, ranking in runs.items() for mode in Mode}
    firsts = {(run, mode): _first_chunk(data, ranking, mode) for run, ranking in runs.items() for mode in Mode}
    rows = []
    for (chunker, cap), ranking in runs.items():
        run, plain = (chunker, cap), (BASELINE, cap)
        has_baseline = chunker != BASELINE and plain in runs
        rows.append(
            ComparisonRow(
                data=data.name,
                chunker=chunker,
                cap=cap,
                chunks=len(ranking.spans),
                mean_characters=ranking.mean_characters,
                characters=data.characters,
                metric=data.metric,
                scores=_means(scores, run),
                against_baseline=_differences(scores, run, plain) if has_baseline else {},
                first_chunk=_means(firsts, run),
                first_chunk_against_baseline=_differences(firsts, run, plain) if has_baseline else {},
            )
        )
    return rows


def chroma_table(data: QuestionSet, runs: Runs) -> list[ChromaRow]:
    """Return, for each published row, the best recall and the best IoU of the dense runs at its characters.

    A part of the questions and their documents compares with nothing that was published: it has no table.
    """
    rows: list[ChromaRow] = []
    if len(data.questions) < CHROMA_QUESTIONS:
        return rows
    for name, tokens, recall, iou in CHROMA_ROWS:
        characters = chroma_characters(data, tokens)
        near = [
            _point(data, run, ranking, Mode.DENSE, round(share * characters))
            for run, ranking in runs.items()
            for share in _NEAR
        ]
        dense = [point for point in near if point.characters == characters]
        hybrid = [_point(data, run, ranking, Mode.HYBRID, characters) for run, ranking in runs.items()]
        by_recall, by_iou = _best_recall(dense), _best_iou(dense)
        rows.append(
            ChromaRow(
                name=name,
                characters=characters,
                their_recall=recall,
                our_recall=by_recall.score,
                by_recall=by_recall.by,
                their_iou=iou,
                our_iou=by_iou.score,
                by_iou=by_iou.by,
                near_recall=_best_recall(near),
                near_iou=_best_iou(near),
                hybrid_recall=_best_recall(hybrid),
                hybrid_iou=_best_iou(hybrid),
            )
        )
    return rows


def _best_recall(points: Sequence[FrontierPoint]) -> Best:
    best = max(points, key=lambda point: point.recall)
    return Best(best.recall, f"{best.chunker} {best.cap}", best.characters)


def _best_iou(points: Sequence[FrontierPoint]) -> Best:
    best = max(points, key=lambda point: point.iou)
    return Best(best.iou, f"{best.chunker} {best.cap}", best.characters)


def frontier(data: QuestionSet, runs: Runs) -> list[FrontierPoint]:
    """Return what every run scores by every mode at budgets around the set's own."""
    budgets = sorted({max(1, round(share * data.characters)) for share in _FRONTIER})
    return [
        _point(data, run, ranking, mode, characters)
        for run, ranking in runs.items()
        for mode in Mode
        for characters in budgets
    ]


def _scores(data: QuestionSet, ranking: Ranking, mode: Mode) -> list[float]:
    """Return each question's score at the set's budget."""
    retrieved = _retrieved(data, ranking, mode, data.characters)
    whole = data.metric is Metric.HIT
    return [
        whole_share(spans, one.gold) if whole else recall_and_iou(spans, one.gold)[0]
        for spans, one in zip(retrieved, data.questions, strict=True)
    ]


def _first_chunk(data: QuestionSet, ranking: Ranking, mode: Mode) -> list[float]:
    """Return each question's hit at 1: the share of its spans that the first chunk holds whole."""
    firsts = [[ranking.spans[row] for row in rows[:1]] for rows in ranking.rows[mode].tolist()]
    return [whole_share(first, one.gold) for first, one in zip(firsts, data.questions, strict=True)]


def _means(scores: _Scores, run: Run) -> dict[Mode, float]:
    return {mode: 100 * float(np.mean(scores[run, mode])) for mode in Mode}


def _differences(scores: _Scores, run: Run, plain: Run) -> dict[Mode, Difference]:
    found = {}
    for mode in Mode:
        mean, low, high = paired_bootstrap(scores[run, mode], scores[plain, mode])
        found[mode] = Difference(100 * mean, 100 * low, 100 * high)
    return found


def _retrieved(data: QuestionSet, ranking: Ranking, mode: Mode, characters: int) -> list[list[Span]]:
    return [ranking.retrieved(mode, at, characters) for at in range(len(data.questions))]


def _point(data: QuestionSet, run: Run, ranking: Ranking, mode: Mode, characters: int) -> FrontierPoint:
    retrieved = _retrieved(data, ranking, mode, characters)
    pairs = [recall_and_iou(spans, one.gold) for spans, one in zip(retrieved, data.questions, strict=True)]
    hits = [whole_share(spans, one.gold) for spans, one in zip(retrieved, data.questions, strict=True)]
    recall, iou = (100 * float(value) for value in np.mean(pairs, axis=0))
    return FrontierPoint(data.name, run[0], run[1], mode, characters, recall, iou, 100 * float(np.mean(hits)))
