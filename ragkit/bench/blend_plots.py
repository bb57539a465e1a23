"""The plots of `ragkit bench blend` as SVG files, drawn by matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.errors import UsageError
from ragkit.figures import check_figure_path, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ragkit.bench.blend_report import BlendReport
    from ragkit.bench.blend_speed import SpeedRow
    from ragkit.bench.recovery import Recovery, Share

SPEED_FILE, QUALITY_FILE = "first_logits_by_length.svg", "recovered_by_budget.svg"

_INCHES = (8.0, 4.5)
_MARKERS = "osD^vP*X<>"
# Colours that people who see fewer of them can tell apart: Okabe and Ito, Color Universal Design (2008).
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#7a7a7a")
_LINES = {"memory": "-", "gpu": "--", "computed": ":"}


def check_plot_folder(folder: Path) -> None:
    """Make the folder, and raise the error that drawing into it would end with.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: the folder is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} of the plots cannot be made: {error.strerror or error}") from error
    check_figure_path(folder / SPEED_FILE)


def write_plots(report: BlendReport, folder: Path) -> list[Path]:
    """Write a plot for each part that was measured, and return the files; errors as in `check_plot_folder`."""
    drawn = [(SPEED_FILE, _speed_figure)] if report.speed else []
    drawn += [(QUALITY_FILE, _quality_figure)] if report.quality else []
    for name, draw in drawn:
        save_figure(draw(report), folder / name)
    return [folder / name for name, _ in drawn]


def _speed_figure(report: BlendReport) -> Figure:
    figure = new_figure(*_INCHES)
    axes = figure.add_subplot()
    lines: dict[str, list[SpeedRow]] = {}
    for row in report.speed:
        lines.setdefault(speed_name(row), []).append(row)
    ratios = sorted({row.ratio for row in report.speed if row.ratio is not None})
    for name, rows in lines.items():
        ratio, place = rows[0].ratio, rows[0].kv_from
        number = 0 if ratio is None else 1 + ratios.index(ratio)
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        line = "-" if place is None else _LINES[place]
        axes.plot(
            [row.tokens for row in rows], [row.first_logits_ms for row in rows], line, color=colour, marker=marker,
            label=name, linewidth=1.4, markersize=4.5,
        )  # fmt: skip
    lengths = sorted({row.tokens for row in report.speed})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    ticks = _round_ticks([row.first_logits_ms for row in report.speed])
    axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("ms to the first logits")
    axes.set_title(f"First logits: {_model_name(report)}, {report.model['dtype']} on {report.model['device']}")
    axes.grid(True, linewidth=0.4, alpha=0.5)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure


def _quality_figure(report: BlendReport) -> Figure:
    figure = new_figure(*_INCHES)
    left, right = figure.subplots(1, 2, sharey=True)
    lines: dict[str, list[Recovery]] = {}
    for row in report.quality[1:]:  # the first is plain reuse
        lines.setdefault(selector_name(row), []).append(row)
    for number, (name, rows) in enumerate(lines.items()):
        style = {"color": _COLOURS[1 + number % (len(_COLOURS) - 1)], "marker": _MARKERS[number % len(_MARKERS)]}
        _draw_shares(left, rows, [row.recovered_first for row in rows], name, style)
        _draw_shares(right, rows, [row.recovered_mean for row in rows], name, style)
    left.set_title("first token")
    right.set_title("mean of 16 tokens")
    left.set_ylabel("recovered % of plain reuse's KL")
    for axes in (left, right):
        axes.axhline(100, color="#7a7a7a", linewidth=0.8)
        axes.axhline(0, color="#7a7a7a", linewidth=0.8)
        axes.set_xlabel("chunk tokens recomputed, %")
        axes.grid(True, linewidth=0.4, alpha=0.5)
    left.set_ylim(bottom=max(-100.0, min(0.0, left.get_ylim()[0])), top=105)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle(f"Blend against full prefill: {_model_name(report)}, {len(report.distances)} prompts")
    return figure


def _draw_shares(
    axes: Any, rows: Sequence[Recovery], shares: Sequence[Share | None], name: str, style: dict[str, str]
) -> None:
    known = [(100 * row.recomputed, share) for row, share in zip(rows, shares, strict=True) if share is not None]
    at = [budget for budget, _ in known]
    axes.plot(at, [100 * share.value for _, share in known], label=name, linewidth=1.4, markersize=4.5, **style)
    low, high = [100 * share.low for _, share in known], [100 * share.high for _, share in known]
    axes.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _model_name(report: BlendReport) -> str:
    return Path(report.model["name"]).name  # of a folder, the last part


def prefill_name(row: SpeedRow) -> str:
    """Return the prefill of a row of the speed table: `full`, `blend 15%`."""
    return "full" if row.ratio is None else f"blend {100 * row.ratio:g}%"


def speed_name(row: SpeedRow) -> str:
    """Return what a row of the speed table is called in plots: `blend 15%, KV from memory`."""
    place = {"memory": ", KV from memory", "gpu": ", KV from the GPU", "computed": ", KV computed"}
    return prefill_name(row) + place.get(str(row.kv_from), "")


def selector_name(row: Recovery) -> str:
    """Return the selector of a row of the quality table."""
    return row.variant.partition(" @ ")[0]


def _round_ticks(values: Sequence[float]) -> list[float]:
    """Return 1, 2, 5, 10, ... from the last at or below the least value to the first at or above the largest."""
    steps = [base * 10.0**power for power in range(-2, 7) for base in (1, 2, 5)]
    below = [step for step in steps if step <= min(values)] or steps[:1]
    above = [step for step in steps if step >= max(values)] or steps[-1:]
    return [step for step in steps if below[-1] <= step <= above[0]]
