"""A heat map as text: shades and numbers, for a terminal, a pipe or a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

_SHADES = ((100.0, "█"), (75.0, "▓"), (40.0, "▒"), (1e-9, "░"))  # from so many percent on
_BLOCKS = 3
LEGEND = "░ above 0   ▒ from 40   ▓ from 75   █ 100"


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float], corner: str = ""
) -> Iterator[str]:
    """Yield lines: a header, a line for each of `rows`, and what the shades mean.

    Args:
        rows, columns: names, in order.
        values: percent by row and column; a cell that is missing stays empty.
        corner: what the rows are, above them.
    """
    shown = _shows_blocks()
    first = max(len(name) for name in (*rows, corner))
    width = max(_BLOCKS + 4, *(len(name) for name in columns))
    yield "  ".join([f"  {corner.ljust(first)}", *(name.rjust(width) for name in columns)])
    for row in rows:
        cells = [_cell(values.get((row, column)), width, shown) for column in columns]
        yield "  ".join([f"  {row.rjust(first)}", *cells]).rstrip()
    if shown:
        yield f"  {' ' * first}  {LEGEND}"


def _cell(value: float | None, width: int, shown: bool) -> str:
    if value is None:
        return " " * width
    shade = next((shade for least, shade in _SHADES if value >= least), " ") if shown else " "
    return f"{shade * _BLOCKS}{value:4.0f}".rjust(width)


def _shows_blocks() -> bool:
    try:
        LEGEND.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
