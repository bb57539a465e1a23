"""Milliseconds of the steps of one request, without stopping a GPU between them."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class StepClock:
    """Starts when it is made. On a GPU the time of a step is that of its work there.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._mark()

    def lap(self, name: str) -> None:
        """End a step."""
        self._names.append(name)
        self._mark()

    def finish(self, arrival: torch.cuda.Event | None = None) -> dict[str, float]:
        """Wait for the last step and return the milliseconds of each.

        With an `arrival` copies went on beside the steps: the first step, which began them, is given the time until the
        last one arrived, and `overlapped` says how much of that was spent below the others.
        """
        if self._events:
            self._events[-1].synchronize()
            first = self._events[0]
            laps = [start.elapsed_time(stop) for start, stop in pairwise(self._events)]
        else:
            laps = [(stop - start) * 1e3 for start, stop in pairwise(self._times)]
        steps = dict(zip(self._names, laps, strict=True))
        overlapped = 0.0
        if arrival is not None:
            arrival.synchronize()
            overlapped = max(0.0, first.elapsed_time(arrival) - laps[0])
            steps[self._names[0]] += overlapped
        return steps | {"overlapped": overlapped}

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())
