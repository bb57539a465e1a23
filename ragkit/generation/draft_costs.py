"""What drafting costs and has brought so far, on one engine: passes by their sizes, and drafters by their names."""

from __future__ import annotations

import threading
from typing import Protocol

from ragkit.kernels.backend import next_power_of_2

_NODES = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)  # how many are told apart in what a pass costs on a CPU
_NEWEST = 0.2  # say of the newest pass in what a pass costs
_OUTLIER = 3.0  # a pass that took so many times what is known counts as this
# Of a plain step: what a pass is taken to cost more before it was measured, and what each node adds. A CPU computes
# where a GPU waits for memory.
_PASS = {"cpu": 0.0, "cuda": 0.05}
_NODE = {"cpu": 0.08, "cuda": 0.005}
_NOMINAL_NODE = 0.02
_NOMINAL_PREFILL = 0.005
# Plain steps that a pass takes which nothing is recorded for, before it was measured: a GPU waits for its launches.
_CATCH_UP = {"cpu": 0.0, "cuda": 3.0}
_NOMINAL_CATCH_UP = 1.0
_PRIOR_ACCEPTANCE, _PRIOR_HOPE = 0.7, 0.9
_PRIOR_TRIES = 8.0
_PRIOR_SPEED, _PRIOR_PASSES = 1.2, 64.0
_FORGET = 0.995  # of what a drafter brought, a pass
_FORGET_REFRESH = 0.3


class DraftRecord:
    """What became of one drafter's drafts, over all requests so far. Safe to use from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = self._tries = 0.0
        self._tokens = self._steps = 0.0
        self.refresh_ms = 0.0

    @property
    def acceptance(self) -> float:
        """How often a drafted token stood whose predecessors did; a guess before there were any."""
        return (self._hits + _PRIOR_ACCEPTANCE * _PRIOR_TRIES) / (self._tries + _PRIOR_TRIES)

    @property
    def hope(self) -> float:
        """The same as it may well turn out."""
        return (self._hits + _PRIOR_HOPE * _PRIOR_TRIES) / (self._tries + _PRIOR_TRIES)

    @property
    def speed(self) -> float:
        """Tokens that it brought in the time of a plain step, passes without drafts included."""
        return (self._tokens + _PRIOR_SPEED * _PRIOR_PASSES) / (self._steps + _PRIOR_PASSES)

    def note(self, drafted: int, stood: int, steps: float) -> None:
        """Note a pass over `drafted` tokens behind each other of which `stood` did, in the time of so many steps."""
        with self._lock:
            tries = min(stood + 1, drafted)
            if tries:
                self._hits = self._hits * _FORGET**tries + stood
                self._tries = self._tries * _FORGET**tries + tries
            self._tokens = self._tokens * _FORGET + stood + 1
            self._steps = self._steps * _FORGET + steps

    def note_refresh(self, ms: float) -> None:
        """Note what it took to retrieve anew and to go on from there."""
        with self._lock:
            known = self.refresh_ms or ms
            self.refresh_ms = known + _FORGET_REFRESH * (ms - known)


class Costs(Protocol):
    """What passes cost, in milliseconds or in plain steps, and what drafters have brought."""

    def of_pass(self, context: int, nodes: int, requests: int = 1) -> float:
        """Return the cost of verifying `nodes` behind `context` tokens, of each request; no node is a plain step."""
        ...

    def of_draft(self, measured_ms: float, share: float, context: int, requests: int = 1) -> float:
        """Return the cost of what took `measured_ms`, 0 where it was never measured, and is a `share` of a step."""
        ...

    @property
    def prefill_share(self) -> float:
        """What a token of a prompt costs, in plain steps."""
        ...

    @property
    def catch_up(self) -> float:
        """What a model takes that is far behind, in plain steps, whatever it has to read."""
        ...

    def note(self, context: int, nodes: int, ms: float, requests: int = 1) -> None:
        """Note a pass."""
        ...

    def record(self, drafter: str) -> DraftRecord:
        """Return what the drafter of this name has brought."""
        ...


class MeasuredCosts:
    """Milliseconds as they were measured, on one engine for all its requests. Safe to use from threads.

    Args:
        device: cpu or cuda. It says what to expect before anything is known, and what is told apart: passes on a GPU
            take as long as the next size that is recorded (`VerifyRunner`).
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._lock = threading.Lock()
        self._known: dict[tuple[int, int], dict[int, float]] = {}
        self._seen: set[tuple[int, int, int]] = set()
        self._records: dict[str, DraftRecord] = {}

    def of_pass(self, context: int, nodes: int, requests: int = 1) -> float:
        """Return milliseconds, those of other sizes scaled where one was not measured; else plain steps."""
        known = self._known.get((context.bit_length(), requests.bit_length()))
        if known is None:
            return self._expected(nodes)
        size = self._size(nodes) if self._device == "cuda" else nodes
        if size in known:
            return known[size]
        sizes = tuple(known)  # another thread may add one
        low = max((one for one in sizes if one < size), default=None)
        high = min((one for one in sizes if one > size), default=None)
        if self._device == "cpu" and low is not None and high is not None:
            return known[low] + (known[high] - known[low]) * (nodes - low) / (high - low)
        nearest = low if low is not None else high
        assert nearest is not None, "where anything is known there is a size"
        return known[nearest] * self._expected(nodes) / self._expected(nearest)

    def of_draft(self, measured_ms: float, share: float, context: int, requests: int = 1) -> float:
        """Return milliseconds where steps are known in milliseconds; else, and if never measured, by the share."""
        if measured_ms > 0 and (context.bit_length(), requests.bit_length()) in self._known:
            return measured_ms
        return share * self.of_pass(context, 0, requests)

    @property
    def prefill_share(self) -> float:
        """What a row more adds to a pass."""
        return _NODE[self._device]

    @property
    def catch_up(self) -> float:
        """Steps whose launches a GPU waits for; a CPU reads everything at once."""
        return _CATCH_UP[self._device]

    def note(self, context: int, nodes: int, ms: float, requests: int = 1) -> None:
        """Note a pass; the first of its kind may have compiled or recorded something and does not count."""
        place, size = (context.bit_length(), requests.bit_length()), self._size(nodes)
        with self._lock:
            if (*place, size) not in self._seen:
                self._seen.add((*place, size))
                return
            known = self._known.get(place, {})
            before = known.get(size, ms)
            self._known[place] = {**known, size: before + _NEWEST * (min(ms, _OUTLIER * before) - before)}

    def record(self, drafter: str) -> DraftRecord:
        """Return what the drafter of this name has brought."""
        with self._lock:
            return self._records.setdefault(drafter, DraftRecord())

    def _size(self, nodes: int) -> int:
        """Return the number of nodes that a pass over `nodes` is counted with."""
        if self._device == "cuda":
            return next_power_of_2(nodes + 1) - 1
        return min(_NODES, key=lambda count: (abs(count - nodes), count)) if nodes else 0

    def _expected(self, nodes: int) -> float:
        rows = self._size(nodes) if self._device == "cuda" else nodes
        return 1.0 + (_PASS[self._device] + _NODE[self._device] * rows if nodes else 0.0)


class NominalCosts:
    """Plain steps, by the bytes that are read: the same on every machine, so that seeds give the same answers."""

    def of_pass(self, context: int, nodes: int, requests: int = 1) -> float:
        """Return a plain step and a little more for every node of every request."""
        return 1.0 + _NOMINAL_NODE * nodes * requests

    def of_draft(self, measured_ms: float, share: float, context: int, requests: int = 1) -> float:
        """Return the share."""
        return share

    @property
    def prefill_share(self) -> float:
        """What a GPU takes, which computes many rows in the time that it reads the weights."""
        return _NOMINAL_PREFILL

    @property
    def catch_up(self) -> float:
        """Another pass."""
        return _NOMINAL_CATCH_UP

    def note(self, context: int, nodes: int, ms: float, requests: int = 1) -> None:
        """Note nothing."""

    def record(self, drafter: str) -> DraftRecord:
        """Return an empty one: answers do not depend on those before."""
        return DraftRecord()
