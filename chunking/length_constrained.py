"""Length-constrained segmentation: the best of all ways to cut under a hard cap, found by a Viterbi search.

A text is a row of units (sentences, say); every boundary between two units has a score, and a chunk of l tokens has a
prior. Cuts c_1 < ... < c_k maximise

    sum over chunks of log Prior(tokens of the chunk) + sum over cuts of score(c_i),

so proposed boundaries and the cap are solved together instead of one being repaired after the other. With
score = log P(boundary) this is the length-constrained split of wtpsplit 2.2 (docs/LENGTH_CONSTRAINTS.md there); with
score = log P - log(1 - P) it is the most probable set of independent boundaries, which cuts exactly where P > 0.5
wherever the cap and the prior leave it free. The search looks back no further than the cap, so its work grows with the
number of units times the units that a chunk can hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ragkit.errors import ChunkingError, UsageError

Indices = NDArray[np.int64]
Scores = NDArray[np.float64]

# What a chunk costs whose length is forbidden. It is finite so that a text without an allowed cut still has a best
# one: that with the fewest forbidden lengths.
FORBIDDEN = -1e4
_BLOCK = 1 << 20  # entries of the table of priors held at once


class LengthPrior(Protocol):
    """How welcome a chunk of some length is."""

    def log_prior(self, tokens: Indices) -> Scores:
        """Return the log prior of chunks of `tokens` tokens: 0 for the most welcome length, never NaN."""
        ...


@dataclass(frozen=True, slots=True)
class UniformPrior:
    """Every length from `min_tokens` up to the cap is equally welcome."""

    min_tokens: int = 0

    def log_prior(self, tokens: Indices) -> Scores:
        """Return 0, and `FORBIDDEN` below the minimum."""
        return np.where(tokens < self.min_tokens, FORBIDDEN, 0.0)


@dataclass(frozen=True, slots=True)
class GaussianPrior:
    """exp(-(l - target)^2 / (2 spread^2)); both in tokens."""

    target: float
    spread: float

    def __post_init__(self) -> None:
        _check(self.target, self.spread)

    def log_prior(self, tokens: Indices) -> Scores:
        """Return the exponent."""
        exponent: Scores = -0.5 * np.square((tokens - self.target) / self.spread)
        return np.maximum(exponent, FORBIDDEN)


@dataclass(frozen=True, slots=True)
class LogNormalPrior:
    """The log-normal density whose mode is `target`, scaled to 1 there: exp(-(ln l - ln target)^2 / (2 spread^2)).

    `spread` is the standard deviation of ln l. Long chunks are forgiven more than short ones.
    """

    target: float
    spread: float

    def __post_init__(self) -> None:
        _check(self.target, self.spread)

    def log_prior(self, tokens: Indices) -> Scores:
        """Return the exponent; no tokens count as half a token."""
        ratio = np.log(np.maximum(tokens, 0.5) / self.target)
        return np.maximum(-0.5 * np.square(ratio / self.spread), FORBIDDEN)


@dataclass(frozen=True, slots=True)
class ClippedPolynomialPrior:
    """max(1 - (l - target)^2 / spread^2, 0): lengths `spread` tokens or more from the target are forbidden."""

    target: float
    spread: float

    def __post_init__(self) -> None:
        _check(self.target, self.spread)

    def log_prior(self, tokens: Indices) -> Scores:
        """Return the logarithm, `FORBIDDEN` where the polynomial is 0."""
        value = 1.0 - np.square((tokens - self.target) / self.spread)
        return np.where(value > 0, np.log(np.maximum(value, np.finfo(np.float64).tiny)), FORBIDDEN)


def best_cuts(
    scores: ArrayLike,
    tokens_before: ArrayLike,
    tokens_after: ArrayLike,
    max_tokens: int,
    prior: LengthPrior | None = None,
) -> Indices:
    """Return the units that open a new chunk, ascending, the first unit left out.

    Args:
        scores: (units - 1,) score of a cut before units 1, 2, ...: log-probabilities or log-odds.
        tokens_before: (units,) tokens from the start of the text up to the end of each unit.
        tokens_after: (units,) the same up to its start. A chunk of the units a to b - 1 has
            `tokens_before[b - 1] - tokens_after[a]` tokens.
        max_tokens: the cap. A unit over it is a chunk of its own. A chunk holds at most this many units, so that
            units without tokens do not make the search quadratic.
        prior: how welcome a length is; every length up to the cap where it is left out.

    Ties go to fewer, longer chunks from the left.

    Raises:
        ChunkingError: a score is NaN.
    """
    prior = prior or UniformPrior()
    before = np.asarray(tokens_before, dtype=np.int64)
    after = np.asarray(tokens_after, dtype=np.int64)
    entry = _entry_scores(scores, len(before))
    first = first_starts(before, after, max_tokens)
    return viterbi(first, _gain_rows(entry, before, after, first, prior))


def first_starts(tokens_before: Indices, tokens_after: Indices, max_tokens: int) -> Indices:
    """Return, for every unit b, the first unit a such that the units a to b make a chunk under the cap."""
    units = np.arange(len(tokens_before), dtype=np.int64)
    by_tokens = np.searchsorted(tokens_after, tokens_before - max_tokens, side="left")
    return np.maximum.accumulate(np.clip(by_tokens, np.maximum(0, units - max_tokens + 1), units))


def viterbi(first: Indices, gains: Iterable[Scores]) -> Indices:
    """Return the units that open a new chunk on the best path, the first unit left out.

    Args:
        first: (units,) for every unit b, the first unit that a chunk which ends with b can open with.
        gains: for every unit b in order, (b + 1 - first[b],) what a chunk that opens with first[b], ..., b and ends
            with b adds to the total.
    """
    best = np.zeros(len(first) + 1)
    opened = np.zeros(len(first), dtype=np.int64)
    for unit, (start, gain) in enumerate(zip(first.tolist(), gains, strict=True)):
        total = best[start : unit + 1] + gain
        choice = int(total.argmax())
        best[unit + 1] = total[choice]
        opened[unit] = start + choice
    cuts: list[int] = []
    unit = len(first)
    while unit > 0:
        unit = int(opened[unit - 1])
        cuts.append(unit)
    return np.asarray(cuts[-2::-1], dtype=np.int64)


def _entry_scores(scores: ArrayLike, units: int) -> Scores:
    """Return the score of opening a chunk with each unit: 0 for the first."""
    entry = np.zeros(units)
    if units:
        inner = np.asarray(scores, dtype=np.float64)
        if inner.shape != (units - 1,):
            raise ChunkingError(f"{units} units need {units - 1} boundary scores, got an array of shape {inner.shape}")
        if np.isnan(inner).any():
            raise ChunkingError(f"the score of the boundary before unit {int(np.isnan(inner).argmax()) + 1} is NaN")
        entry[1:] = np.clip(inner, FORBIDDEN, -FORBIDDEN)
    return entry


def _gain_rows(entry: Scores, before: Indices, after: Indices, first: Indices, prior: LengthPrior) -> Iterator[Scores]:
    """Yield each unit's row of gains; the priors of many rows are computed at once."""
    widths = np.arange(1, len(first) + 1) - first
    start = 0
    while start < len(first):
        # Rows are laid end to end, so that a few wide ones do not widen the others.
        ends = np.cumsum(widths[start : start + _BLOCK])
        rows = max(1, int(np.searchsorted(ends, _BLOCK, side="right")))
        stop = start + rows
        width = widths[start:stop]
        ends = ends[:rows]
        opens = np.arange(ends[-1]) - np.repeat(ends - width - first[start:stop], width)
        gains = prior.log_prior(np.repeat(before[start:stop], width) - after[opens]) + entry[opens]
        previous = 0
        for end in ends.tolist():
            yield gains[previous:end]
            previous = end
        start = stop


def _check(target: float, spread: float) -> None:
    if not (target > 0 and spread > 0):
        raise UsageError(f"a length prior needs a target and a spread above 0, got {target} and {spread}")
