"""How long the named steps of one request took, also where they run in different threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_Result = TypeVar("_Result")


class Stopwatch:
    """Collects `milliseconds` by name; each name is written by one thread."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block, failures included."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.milliseconds[name] = 1000 * (time.perf_counter() - started)

    def timed(self, name: str, work: Callable[[], _Result]) -> _Result:
        """Return what `work` returns, and keep how long it took."""
        with self(name):
            return work()
