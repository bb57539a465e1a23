"""Plots of a few bars as text, for a terminal, a pipe or a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

_FULL, _EIGHTHS = "█", " ▏▎▍▌▋▊▉"
_PLAIN = "#"  # where stdout cannot show blocks
LEAST_WIDTH = 10


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: the group that it belongs to, its name, its length, and what stands behind it."""

    group: str
    name: str
    value: float
    text: str


def bars(rows: Sequence[Bar], width: int, *, largest: float | None = None) -> Iterator[str]:
    """Yield a line a bar, groups apart by an empty line; the longest line takes `width` characters.

    Args:
        rows: those of one group stand together.
        width: of the whole plot.
        largest: the value of a bar of full length; the largest of `rows` where left out. A value below 0 has no bar.
    """
    groups, names = max((len(row.group) for row in rows), default=0), max((len(row.name) for row in rows), default=0)
    texts = max((len(row.text) for row in rows), default=0)
    room = max(LEAST_WIDTH, width - groups - names - texts - 7)
    top = largest if largest is not None else max((row.value for row in rows), default=0.0)
    for number, (group, members) in enumerate(groupby(rows, key=lambda row: row.group)):
        if number:
            yield ""
        for place, row in enumerate(members):
            label = group if place == 0 else ""
            line = f"  {label.rjust(groups)}  {row.name.ljust(names)}  {_bar(row.value, top, room)} {row.text}"
            yield line.rstrip()


def _bar(value: float, top: float, room: int) -> str:
    share = min(1.0, max(0.0, value / top)) if top > 0 else 0.0
    if not _shows_blocks():
        return _PLAIN * round(share * room)
    eighths = round(share * room * 8)
    return _FULL * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _shows_blocks() -> bool:
    try:
        (_FULL + _EIGHTHS).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
