"""Copies from the host to a GPU beside the computation, in order, some of them ahead of what waits for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

_AHEAD = 3  # jobs that are issued before anybody waits for them: enough to keep the copy engine busy


class CopyQueue:
    """The copies of one request, on a stream of their own. On a CPU they happen when they are issued.

    Jobs run in the order in which they were added, postponed ones behind all others. Issuing one takes the host some
    time, so only a few more are issued than the computation has asked for.

    Args:
        device: where the copies go.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = _copy_stream(device) if device.type == "cuda" else None
        self._device = device
        self._jobs: list[Callable[[], None]] = []
        self._order: list[int] = []  # the numbers of the jobs; the first `_issued` were issued
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._issued = 0

    def add(self, job: Callable[[], None]) -> int:
        """Append a job, which issues copies to the current stream, and return its number."""
        self._jobs.append(job)
        self._order.append(len(self._jobs) - 1)
        return len(self._jobs) - 1

    def postpone(self, numbers: Iterable[int]) -> None:
        """Put those of these jobs that were not issued behind all others; nobody may ever ask for them."""
        later = set(numbers)
        waiting = self._order[self._issued :]
        self._order[self._issued :] = sorted(waiting, key=lambda number: number in later)

    def start(self, jobs: int = _AHEAD) -> None:
        """Issue the first jobs."""
        self._issue(jobs)

    def wait(self, number: int) -> None:
        """Make the current stream wait for a job and those before it; the host goes on at once."""
        self._issue(self._order.index(number) + 1 + _AHEAD)
        if self.stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[number])

    def finish(self) -> None:
        """Have the host wait until every copy that was issued has arrived, and let go of what all jobs copy."""
        arrival = self.last_arrival()
        if arrival is not None:
            arrival.synchronize()
        self._jobs.clear()

    def last_arrival(self) -> torch.cuda.Event | None:
        """Return the event, with a time, after the last copy that was issued; None on a CPU or without a copy."""
        return self._arrived[self._order[self._issued - 1]] if self._arrived else None

    def _issue(self, count: int) -> None:
        count = min(count, len(self._jobs))
        if self._issued >= count:
            return
        if self.stream is None:
            while self._issued < count:
                self._jobs[self._order[self._issued]]()
                self._issued += 1
            return
        if self._issued == 0:
            # What the copies overwrite may still be read by work that was issued before.
            self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            while self._issued < count:
                number = self._order[self._issued]
                self._jobs[number]()
                event = torch.cuda.Event(enable_timing=True)
                event.record(self.stream)
                self._arrived[number] = event
                self._issued += 1


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
