"""The heat maps of `ragkit eval needle` and `ragkit eval ruler` as one SVG file, a panel for each strategy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.errors import UsageError
from ragkit.figures import check_figure_path, new_figure, save_figure

if TYPE_CHECKING:
    from ragkit.bench.long_report import HeatCell, LongReport

_INCHES = (0.75, 0.32)  # of a cell
_MARGIN = (2.0, 1.4)
_PANELS_ACROSS = 3
_DARK = 45.0  # percent below which a cell is dark, so that its number must be light


def heat_map_file(evaluation: str) -> str:
    """Return the name of the file."""
    return f"{evaluation}_heat_map.svg"


def check_heat_map_folder(folder: Path) -> None:
    """Make the folder, and raise the error that drawing into it would end with.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: the folder is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} of the plots cannot be made: {error.strerror or error}") from error
    check_figure_path(folder / "heat_map.svg")


def write_heat_map(report: LongReport, evaluation: str, rows: str, folder: Path) -> Path:
    """Write the heat maps, whose rows are named `rows` (depth, task), and return the file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: the file cannot be written.
    """
    strategies = list(dict.fromkeys(cell.strategy for cell in report.cells))
    names = list(dict.fromkeys(cell.row for cell in report.cells))
    lengths = sorted({cell.length for cell in report.cells})
    across = min(len(strategies), _PANELS_ACROSS)
    down = -(-len(strategies) // across)
    width = _MARGIN[0] + across * (1.0 + _INCHES[0] * len(lengths))
    figure = new_figure(width, down * (_MARGIN[1] + _INCHES[1] * len(names)))
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in panels.flat[len(strategies) :]:
        axes.set_axis_off()
    for axes, strategy in zip(panels.flat, strategies, strict=False):
        cells = {(cell.row, cell.length): cell for cell in report.cells if cell.strategy == strategy}
        _draw(axes, cells, names, lengths)
        axes.set_title(strategy)
        axes.set_xlabel("tokens")
    for axes in panels[:, 0]:
        axes.set_ylabel(rows)
    model = Path(str(report.settings.get("generator", ""))).name
    figure.suptitle(f"{evaluation}: score in percent, {model}", fontsize="medium")
    path = folder / heat_map_file(evaluation)
    save_figure(figure, path)
    return path


def _draw(axes: Any, cells: dict[tuple[str, int], HeatCell], names: list[str], lengths: list[int]) -> None:
    missing = float("nan")
    values = [
        [cells[name, length].score if (name, length) in cells else missing for length in lengths] for name in names
    ]
    axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=100)
    axes.set_ylim(len(names), 0)
    for row, name in enumerate(names):
        for column, length in enumerate(lengths):
            cell = cells.get((name, length))
            if cell is not None:
                colour = "white" if cell.score < _DARK else "black"
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{cell.score:.0f}",
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize="small",
                )
    axes.set_xticks([at + 0.5 for at in range(len(lengths))], [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks([at + 0.5 for at in range(len(names))], names)
    axes.tick_params(length=0, labelsize="small")
