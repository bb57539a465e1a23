"""Retrieved spans against the spans that answer: shares and overlaps in characters, at equal retrieved characters.

Recall and intersection over union are those of Chroma's chunking evaluation (brandonstarxel/chunking_evaluation,
base_evaluation.py): characters, where retrieved chunks that overlap count once in the numerator and each time below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

Span: TypeAlias = tuple[str, int, int]  # document uri, first character, one past the last


def within_budget(spans: Iterable[Span], characters: int) -> list[Span]:
    """Return the spans up to `characters` characters in all; the last one is cut to fit."""
    kept: list[Span] = []
    left = characters
    for uri, start, stop in spans:
        if left <= 0:
            break
        kept.append((uri, start, min(stop, start + left)))
        left -= stop - start
    return kept


def whole_share(retrieved: Sequence[Span], gold: Sequence[Span]) -> float:
    """Return the share of the gold spans that lie whole within one retrieved span."""
    return sum(
        any(uri == got and start <= first and last <= stop for got, start, stop in retrieved)
        for uri, first, last in gold
    ) / len(gold)


def covered_share(retrieved: Sequence[Span], gold: Sequence[Span]) -> float:
    """Return the share of the gold characters that are retrieved: recall."""
    return recall_and_iou(retrieved, gold)[0]


def recall_and_iou(retrieved: Sequence[Span], gold: Sequence[Span]) -> tuple[float, float]:
    """Return recall, and the intersection over the union of what was retrieved and what was wanted."""
    wanted = _merged(gold)
    size = sum(stop - start for _, start, stop in retrieved)
    total = _length(wanted)
    overlaps = [
        (uri, max(start, first), min(stop, last))
        for uri, first, last in wanted
        for got, start, stop in retrieved
        if got == uri and start < last and first < stop
    ]
    covered = _length(_merged(overlaps))
    return covered / total, covered / (size + total - covered)


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Return disjoint spans that cover the same characters."""
    merged: list[Span] = []
    for uri, start, stop in sorted(spans):
        if merged and merged[-1][0] == uri and start <= merged[-1][2]:
            merged[-1] = (uri, merged[-1][1], max(merged[-1][2], stop))
        else:
            merged.append((uri, start, stop))
    return merged


def _length(spans: Iterable[Span]) -> int:
    return sum(stop - start for _, start, stop in spans)
