"""Shows how far a long measurement is, and says when its time is over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ragkit.progress import Progress


class Watch:
    """The progress and the time limit of one measurement.

    Args:
        progress: hears about every step.
        seconds: most time that is spent; what runs when it is over is finished.
        clock: tells seconds.
    """

    def __init__(
        self, progress: Progress, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress = progress
        self._clock = clock
        self._seconds = seconds
        self._started = clock()

    @property
    def is_over(self) -> bool:
        """Whether the time is spent."""
        return self._clock() - self._started >= self._seconds

    def part(self, share: float) -> Watch:
        """Return a watch over a share of the time that is left."""
        left = max(0.0, self._seconds - (self._clock() - self._started))
        return Watch(self._progress, left * share, self._clock)

    def start(self, steps: int, unit: str) -> None:
        """Begin a stage of so many steps."""
        self._progress.start(steps, 0, unit)

    def step(self) -> None:
        """Count one step."""
        self._progress.advance(documents=1)
