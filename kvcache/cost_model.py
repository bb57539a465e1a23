"""What a kind of work costs, learned while it is done: seconds for each piece, and for each byte or token of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

_KEPT = 32  # measurements
_FADE = 0.9  # a measurement weighs this much less than the one after it
_PRIOR_WEIGHT = 1.0  # of each of the two measurements that the prior stands for
_PRIOR_SPREAD = 4.0  # they are of pieces this many times smaller and larger than those that were measured


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a piece of work.

    Attributes:
        per_piece: what each piece takes whatever its size: a disk's latency, the launches of a pass.
        per_unit: what each byte or token adds.
    """

    per_piece: float
    per_unit: float

    def seconds(self, units: float, pieces: int = 1) -> float:
        """Return what `pieces` of together `units` take."""
        return pieces * self.per_piece + units * self.per_unit


@dataclass(frozen=True, slots=True)
class _Measured:
    pieces: int
    units: float
    seconds: float


class CostModel:
    """The `Cost` of one kind of work. Not thread-safe.

    The line of least absolute error of the logarithm through the latest measurements, newer ones weighing more. Least
    absolute errors make it the line of the majority: a first pass that compiles, a busy moment or a few reads from the
    page cache leave it where it was, and a lasting change moves it within a few measurements. The prior counts as two
    measurements, of smaller and larger pieces than those that were seen.

    Args:
        prior: what to expect before anything was measured.
    """

    def __init__(self, prior: Cost) -> None:
        self._prior = prior
        self._measured: deque[_Measured] = deque(maxlen=_KEPT)
        self._cost = prior
        self.count = 0

    @property
    def cost(self) -> Cost:
        """The estimate."""
        return self._cost

    def add(self, units: float, seconds: float, pieces: int = 1) -> None:
        """Take in that `pieces` of together `units` took `seconds`."""
        self._measured.append(_Measured(pieces, units, max(seconds, 1e-9)))
        self.count += 1
        self._cost = self._fit()

    def _fit(self) -> Cost:
        """Return the best of the lines through two measurements, or through one and zero: one of them is least."""
        sizes = sorted(one.units / one.pieces for one in self._measured)
        typical = sizes[len(sizes) // 2]
        prior_sizes = (typical / _PRIOR_SPREAD, typical * _PRIOR_SPREAD)
        known = [*self._measured, *(_Measured(1, size, self._prior.seconds(size)) for size in prior_sizes)]
        size = np.array([one.units / one.pieces for one in known])
        took = np.array([max(one.seconds / one.pieces, 1e-9) for one in known])
        fading = _FADE ** np.arange(len(self._measured) - 1, -1, -1)
        weight = np.append(fading, [_PRIOR_WEIGHT, _PRIOR_WEIGHT])
        one, other = np.triu_indices(len(known), 1)
        apart = np.abs(size[one] - size[other]) > 0.01 * (size[one] + size[other])
        one, other = one[apart], other[apart]
        slope = (took[one] - took[other]) / (size[one] - size[other])
        per_unit = np.concatenate([slope, took / np.maximum(size, 1e-9), np.zeros_like(took)])
        per_piece = np.concatenate([took[one] - slope * size[one], np.zeros_like(took), took])
        possible = (per_unit >= 0) & (per_piece >= 0)
        per_unit, per_piece = per_unit[possible], per_piece[possible]
        expected_s = np.maximum(per_piece[:, None] + per_unit[:, None] * size, 1e-12)
        errors = np.abs(np.log(expected_s / took)) @ weight
        best = int(errors.argmin())
        return Cost(float(per_piece[best]), float(per_unit[best]))
