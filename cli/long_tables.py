"""What `ragkit eval needle` and `ragkit eval ruler` print for people: heat maps, means and notes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from ragkit.cli.heat_map import heat_map
from ragkit.cli.output import bold, one_line, table

if TYPE_CHECKING:
    from ragkit.bench.long_report import LongReport, ScoreRow

_WIDTH = 100


def report_lines(report: LongReport, rows: str) -> Iterator[str]:
    """Yield a heat map for each strategy, whose rows are named `rows`, the table of means, and the notes."""
    if not report.rows:
        yield "nothing was measured"
    for strategy in dict.fromkeys(cell.strategy for cell in report.cells):
        cells = [cell for cell in report.cells if cell.strategy == strategy]
        yield bold(f"{one_line(strategy)}: score in percent by {rows} and tokens", sys.stdout)
        names = list(dict.fromkeys(cell.row for cell in report.cells))
        lengths = sorted({cell.length for cell in report.cells})
        values = {(cell.row, f"{cell.length:,}"): cell.score for cell in cells}
        yield from heat_map(names, [f"{length:,}" for length in lengths], values, rows)
        yield ""
    if report.rows:
        yield from _table(report.rows)
    for note in report.notes:
        yield from wrap(f"note: {one_line(note)}", _WIDTH)


def _table(rows: Sequence[ScoreRow]) -> Iterator[str]:
    several = len({row.strategy for row in rows}) > 1
    header = ["strategy", "task", "tokens", "asked", "score % (95%)"]
    header += [f"against {one_line(rows[0].strategy)}"] if several else []
    header += ["gold shown %", "prompt", "s to read", "to answer"]
    cells: list[list[object]] = []
    for row in rows:
        interval = f"{row.score:.1f} [{row.low:.1f}, {row.high:.1f}]"
        cells.append([row.strategy, row.task, row.length, row.questions, interval])
        cells[-1] += [_against(row)] if several else []
        seconds = [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in (row.document_seconds, row.seconds)]
        cells[-1] += [round(row.gold_shown), round(row.prompt_tokens), *seconds]
    yield from table(header, cells)


def _against(row: ScoreRow) -> str:
    value = row.against_first
    return "" if value is None else f"{value.mean:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"
