"""How long work shows itself on stderr: a bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ragkit.cli.output import Output, human_bytes, is_terminal, one_line
from ragkit.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL_S = 5.0


def progress_for(output: Output) -> Progress:
    """Return the display that fits stderr and `--quiet`."""
    if output.quiet:
        return Silent()
    return BarProgress() if is_terminal(sys.stderr) else PlainProgress()


class Meter:
    """Counts what is done, and says it with rates and the time to go."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.start(0, 0)

    def start(self, total_documents: int, total_bytes: int, unit: str = "documents") -> None:
        """Begin counting from nothing."""
        self.started = self._clock()
        self.total_documents, self.total_bytes, self.unit = total_documents, total_bytes, unit
        self.documents = self.bytes = self.tokens = self.hits = self.misses = 0

    def add(self, documents: int, bytes: int, tokens: int, hits: int = 0, misses: int = 0) -> None:
        """Count more."""
        self.hits += hits
        self.misses += misses
        self.documents += documents
        self.bytes += bytes
        self.tokens += tokens

    @property
    def fraction(self) -> float:
        """Share that is done, in [0, 1]; by bytes where there are any, else by documents."""
        done, total = (self.bytes, self.total_bytes) if self.total_bytes else (self.documents, self.total_documents)
        return min(1.0, done / total) if total else 0.0

    def __str__(self) -> str:
        seconds = max(self._clock() - self.started, 1e-9)
        parts = []
        if self.total_documents:
            parts.append(f"{self.documents:,}/{self.total_documents:,} {self.unit}")
        if self.bytes and self.unit != "documents":  # bytes that are written, not those of sources
            parts.append(f"{human_bytes(self.bytes)} of {human_bytes(self.total_bytes)}")
        if self.bytes:
            parts.append(f"{self.bytes / 1e6 / seconds:.2f} MB/s")
        if self.unit == "rows" and self.documents:
            parts.append(f"{self.documents / seconds:,.1f} rows/s")
        if self.tokens and not self.documents:  # small documents are counted when their group is committed
            parts.append(f"{self.tokens:,} tokens")
        if self.tokens:
            parts.append(f"{self.tokens / seconds:,.0f} tokens/s")
        if self.hits or self.misses:
            parts.append(f"{self.hits / (self.hits + self.misses):.0%} of chunk KV found")
        if 0 < self.fraction < 1:
            parts.append(f"ETA {clock_text(seconds / self.fraction - seconds)}")
        return ", ".join(parts)


class PlainProgress:
    """Writes a line now and then: for logs and pipes."""

    def __init__(self, interval_s: float = PLAIN_INTERVAL_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._meter = Meter(clock)
        self._last = clock()

    def start(self, total_documents: int, total_bytes: int, unit: str = "documents") -> None:
        """Say how much work there is."""
        self._meter.start(total_documents, total_bytes, unit)
        self._last = self._clock()

    def advance(self, documents: int = 0, bytes: int = 0, tokens: int = 0, hits: int = 0, misses: int = 0) -> None:
        """Count, and write a line when the last one is old enough."""
        self._meter.add(documents, bytes, tokens, hits, misses)
        if self._clock() - self._last >= self._interval_s:
            self._last = self._clock()
            self.message(str(self._meter))

    def message(self, text: str) -> None:
        """Write one line."""
        sys.stderr.write(one_line(text) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Nothing to end."""


class BarProgress:
    """Draws one bar that disappears when the work ends."""

    def __init__(self) -> None:
        self._meter = Meter()
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, total_documents: int, total_bytes: int, unit: str = "documents") -> None:
        """Draw the bar, empty."""
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self.close()
        self._meter.start(total_documents, total_bytes, unit)
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rates]}", markup=False),
        )
        self._bars = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bars.add_task("", total=1.0, rates=str(self._meter))
        self._bars.start()

    def advance(self, documents: int = 0, bytes: int = 0, tokens: int = 0, hits: int = 0, misses: int = 0) -> None:
        """Count and redraw."""
        self._meter.add(documents, bytes, tokens, hits, misses)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._meter.fraction, rates=str(self._meter))

    def message(self, text: str) -> None:
        """Write one line above the bar."""
        line = one_line(text)
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = self._task = None


def clock_text(seconds: float) -> str:
    """Return a time for people: `1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
