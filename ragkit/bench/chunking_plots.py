"""The frontier of the chunking evaluation as a figure: what is found against how many characters are retrieved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ragkit.bench.chunking_quality import ChunkingReport
from ragkit.bench.chunking_rankings import Mode
from ragkit.bench.chunking_tables import ChromaRow, FrontierPoint
from ragkit.bench.chunking_variants import BASELINE
from ragkit.bench.question_sets import Metric
from ragkit.figures import new_figure, save_figure

_INCHES = (4.6, 4.2)  # of one panel
# Colours that people who see fewer of them can tell apart: Okabe and Ito, Color Universal Design (2008).
_COLOURS = {Mode.DENSE: "#0072b2", Mode.BM25: "#d55e00", Mode.HYBRID: "#009e73"}

_Score = Callable[[FrontierPoint], float]


def plot_frontier(report: ChunkingReport, path: Path) -> None:
    """Write a figure with a panel for each set, two for chunking_evaluation (recall and IoU, with Chroma's rows).

    A line is the best of all runs at each number of characters; a dashed one the best of the baseline's caps.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: the file cannot be written, or its ending is no known format.
    """
    metrics = {row.data: row.metric for row in report.rows}
    panels = [panel for data, metric in metrics.items() for panel in _panels(data, metric)]
    figure = new_figure(_INCHES[0] * len(panels), _INCHES[1])
    for axes, (data, label, score) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        points = [point for point in report.points if point.data == data]
        _draw(axes, points, score)
        if data == "chunking_evaluation":
            _draw_chroma(axes, report.chroma, label)
        axes.set_title(data)
        axes.set_ylabel(label)
    save_figure(figure, path)


def _panels(data: str, metric: Metric) -> list[tuple[str, str, _Score]]:
    if metric is Metric.HIT:
        return [(data, "answer whole in one piece, %", lambda point: point.hit)]
    panels: list[tuple[str, str, _Score]] = [(data, "recall, %", lambda point: point.recall)]
    if data == "chunking_evaluation":
        panels.append((data, "IoU, %", lambda point: point.iou))
    return panels


def _draw(axes: Any, points: Sequence[FrontierPoint], score: _Score) -> None:
    for mode, colour in _COLOURS.items():
        ours = [point for point in points if point.mode is mode]
        plain = [point for point in ours if point.chunker == BASELINE]
        axes.plot(*_best(ours, score), "o-", color=colour, label=f"{mode}, best", linewidth=1.4, markersize=4)
        if plain and len(plain) < len(ours):
            axes.plot(*_best(plain, score), "--", color=colour, label=f"{mode}, {BASELINE}", linewidth=1.0)
    axes.set_xscale("log", base=2)
    budgets = sorted({point.characters for point in points})
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets], fontsize="small")
    axes.minorticks_off()
    axes.set_xlabel("characters retrieved")
    axes.grid(True, linewidth=0.4, alpha=0.5)
    axes.legend(fontsize="small", frameon=False)


def _draw_chroma(axes: Any, rows: Iterable[ChromaRow], label: str) -> None:
    found = list(rows)
    if found:
        values = [row.their_recall if label.startswith("recall") else row.their_iou for row in found]
        axes.plot([row.characters for row in found], values, "kx", markersize=5, label="Chroma's report, dense")
        axes.legend(fontsize="small", frameon=False)


def _best(points: Sequence[FrontierPoint], score: _Score) -> tuple[list[int], list[float]]:
    """Return budgets, ascending, and the best score at each."""
    ordered = sorted(points, key=lambda point: point.characters)
    groups = [(budget, list(group)) for budget, group in groupby(ordered, key=lambda point: point.characters)]
    return [budget for budget, _ in groups], [max(map(score, group)) for _, group in groups]
