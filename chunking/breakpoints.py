"""Rules that say which of a row of distances are breakpoints.

The distances are 1 - cosine similarity between what stands before and behind each boundary. `PERCENTILE` is the rule
of LlamaIndex's `SemanticSplitterNodeParser` and of Kamradt's splitter; `STANDARD_DEVIATION` and `GRADIENT` those of
LangChain's `SemanticChunker`; `LOCAL_MINIMUM` (of the similarity) that of chonkie's. The rules look at one text, so
what they call a breakpoint is relative to its other boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.length_constrained import Scores
from ragkit.errors import UsageError

_SMOOTHING_WINDOW, _SMOOTHING_ORDER = 5, 3
_LEAST = 1e-3  # log-odds of a decision with no margin
_FLAT = 1e-6  # distances that vary less are equal but for rounding


class BreakpointRule(StrEnum):
    """How breakpoints are told from the rest."""

    PERCENTILE = "percentile"
    STANDARD_DEVIATION = "standard_deviation"
    GRADIENT = "gradient"
    LOCAL_MINIMUM = "local_minimum"


DEFAULT_AMOUNTS = {
    BreakpointRule.PERCENTILE: 95.0,
    BreakpointRule.STANDARD_DEVIATION: 3.0,
    BreakpointRule.GRADIENT: 95.0,
    BreakpointRule.LOCAL_MINIMUM: 80.0,
}


@dataclass(frozen=True, slots=True)
class Breakpoints:
    """The decision on every boundary.

    Attributes:
        accepted: (boundaries,) True for a breakpoint.
        threshold: what the rule's measure was compared with.
        log_odds: (boundaries,) above 0 exactly where accepted: the distance from the threshold, in standard
            deviations of the measure. Under a cap this ranks the boundaries that the rule itself left alone.
    """

    accepted: NDArray[np.bool_]
    threshold: float
    log_odds: Scores


def check_amount(rule: BreakpointRule, amount: float) -> None:
    """Raise `UsageError` where `amount` is impossible: a percentile outside 0 to 100, or not a number."""
    percentile = rule is not BreakpointRule.STANDARD_DEVIATION
    if not np.isfinite(amount) or (percentile and not 0 <= amount <= 100):
        asked = "a percentile from 0 to 100" if percentile else "a number of standard deviations"
        raise UsageError(f"the rule {rule.value} needs {asked}, got {amount}")


def find_breakpoints(distances: Scores, rule: BreakpointRule, amount: float) -> Breakpoints:
    """Return which of `distances` (boundaries,) are breakpoints.

    Args:
        distances: finite, larger where two neighbours have less in common.
        rule: the rule.
        amount: its percentile, or for `STANDARD_DEVIATION` how many of them above the mean.

    `PERCENTILE` and `STANDARD_DEVIATION` accept distances above the threshold. `GRADIENT` compares the gradient of
    the distances instead of the distances. `LOCAL_MINIMUM` smooths them (Savitzky-Golay, window 5, order 3) and
    accepts the local maxima that reach the threshold, a percentile of the smoothed distances.
    """
    check_amount(rule, amount)
    if not len(distances):
        return Breakpoints(np.zeros(0, np.bool_), 0.0, np.zeros(0))
    measure = distances
    if rule is BreakpointRule.GRADIENT:
        measure = np.gradient(distances) if len(distances) > 1 else np.zeros(1)
    elif rule is BreakpointRule.LOCAL_MINIMUM:
        measure = savitzky_golay(distances)
    deviation = float(measure.std())
    if deviation < _FLAT:  # nothing sticks out
        return Breakpoints(np.zeros(len(measure), np.bool_), float(measure[0]), np.full(len(measure), -_LEAST))
    if rule is BreakpointRule.STANDARD_DEVIATION:
        threshold = float(measure.mean()) + amount * deviation
    else:
        threshold = float(np.percentile(measure, amount))
    accepted = (
        _is_peak(measure) & (measure >= threshold) if rule is BreakpointRule.LOCAL_MINIMUM else measure > threshold
    )
    margin = (measure - threshold) / deviation
    odds = np.where(accepted, np.maximum(margin, _LEAST), np.minimum(margin, -_LEAST))
    return Breakpoints(accepted, threshold, odds)


def savitzky_golay(values: Scores) -> Scores:
    """Return `values` smoothed by a cubic least-squares fit over five neighbours.

    At the ends the fit over the five outermost values is read off. Fewer than five values come back unchanged.
    Source: Savitzky and Golay, Analytical Chemistry 36 (1964).
    """
    if len(values) < _SMOOTHING_WINDOW:
        return values
    half = _SMOOTHING_WINDOW // 2
    powers = np.vander(np.arange(-half, half + 1, dtype=np.float64), _SMOOTHING_ORDER + 1)
    fit = powers @ np.linalg.pinv(powers)  # (window, window): values of the fit at each place from the values
    smoothed = np.convolve(values, fit[half][::-1], mode="same")
    smoothed[:half] = fit[:half] @ values[:_SMOOTHING_WINDOW]
    smoothed[-half:] = fit[-half:] @ values[-_SMOOTHING_WINDOW:]
    return smoothed


def _is_peak(values: Scores) -> NDArray[np.bool_]:
    """Return where a value is above the one before and not below the one behind; beyond the ends lies nothing."""
    padded = np.concatenate([[-np.inf], values, [-np.inf]])
    return (padded[1:-1] > padded[:-2]) & (padded[1:-1] >= padded[2:])
