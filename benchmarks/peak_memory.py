"""The peak of the resident memory of this process and all its descendants, parser children included.

`ru_maxrss` cannot be used for the children: a child starts with its parent's mark.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


class PeakMemory:
    """Samples the resident sets every 50 ms while the block runs; pages that processes share count in each.

    Attributes:
        start_mb: what this process and its descendants held when the block began, in MB of 10^6 bytes.
        peak_mb: the largest sum seen.
    """

    def __init__(self) -> None:
        self.start_mb = 0.0
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.start_mb = self.peak_mb = family_mb()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak_mb = max(self.peak_mb, family_mb())


def family_mb() -> float:
    """Return the resident memory of this process and its descendants, in MB of 10^6 bytes."""
    return sum(map(_resident_mb, _family()))


def _family() -> list[str]:
    family, waiting = [], ["self"]
    while waiting:
        process = waiting.pop()
        family.append(process)
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                waiting += children.read_text(encoding="ascii").split()
            except OSError:  # the thread or process has just ended
                continue
    return family


def _resident_mb(process: str) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_MB
    except OSError:  # the process has just ended
        return 0.0
