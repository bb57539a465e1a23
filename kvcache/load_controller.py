"""Which stored chunks to load and which to compute anew, so that the KV of a request is whole soonest.

Loads run beside computing, so the time is that of the slower of the two: a makespan on two unlike machines. Chunks
are ranked by how much sooner loading is than computing; those in front are loaded and those behind are computed, and
the cut is where both sides end together. CacheBlend (arXiv 2405.16444, section 5.1) and CacheGen (arXiv 2310.07240,
section 5.3) weigh the same two rates, the one to set its ratio and the other to choose a level for each chunk.

What either costs is measured while it is done. A chunk that is computed passes through the same codec, so no answer
depends on what was decided.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.cost_model import Cost, CostModel

COMPUTING = "compute"  # how computing is called among the costs

_CACHED_DISK = "disk, cached"
_PRIORS = {"disk": Cost(3e-4, 1 / 1.5e9), _CACHED_DISK: Cost(1e-4, 1 / 5e9)}  # an ordinary SSD; seconds and s/byte
_REMOTE = Cost(1e-2, 1 / 1e8)
_TOGETHER = 8  # loads that one measurement takes together, since they share the disk
_TRY_AGAIN = 16  # requests for which a place may be passed over before it is measured again
_LEAST_GAIN = 0.05  # of the time, or everything is loaded: computing takes the device from others

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk that a tier says it has.

    Attributes:
        ref: which.
        tier: name of the tier.
        nbytes: of its record.
        is_cached: whether the operating system has it in memory.
    """

    ref: ChunkRef
    tier: str
    nbytes: int
    is_cached: bool = False

    @property
    def place(self) -> str:
        """What kind of load it is: loads of one kind share a cost."""
        return _CACHED_DISK if self.is_cached and self.tier == "disk" else self.tier


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What becomes of the stored chunks of a request.

    Attributes:
        load: to be loaded, in this order.
        compute: to be computed although they are stored, in this order.
        expected_s: when everything is there.
    """

    load: tuple[StoredChunk, ...]
    compute: tuple[StoredChunk, ...]
    expected_s: float


class LoadController:
    """Learns what loading and computing cost, and decides between them. Thread-safe.

    Loads of one kind that run at the same time are measured together, by the time in which any of them ran, so their
    cost is that of the place and not of a thread. A place that every plan passed over is given one chunk now and then;
    no request waits for that much longer than for computing it.

    Args:
        compute_prior: seconds a chunk and a token, before any was computed.
        try_again: after how many requests that passed over a place it is given a chunk.
    """

    def __init__(self, compute_prior: Cost, *, try_again: int = _TRY_AGAIN) -> None:
        self._lock = threading.Lock()
        self._computing = CostModel(compute_prior)
        self._loading: dict[str, _LoadMeter] = {}
        self._passed_over: dict[str, int] = {}
        self._try_again = try_again

    def plan(self, stored: Sequence[StoredChunk], lacking_tokens: Sequence[int] = ()) -> LoadPlan:
        """Return what to do with `stored`, while chunks of `lacking_tokens` have to be computed in any case."""
        with self._lock:
            load_s = [self._load_cost(chunk) for chunk in stored]
            compute_s = [self._compute_cost(chunk) for chunk in stored]
            must_s = sum(self._computing.cost.seconds(tokens) for tokens in lacking_tokens)
            order = sorted(range(len(stored)), key=lambda index: load_s[index] / max(compute_s[index], 1e-9))
            cut, expected_s = _cut([load_s[index] for index in order], [compute_s[index] for index in order], must_s)
            ranked = [stored[index] for index in order]
            loaded, computed = self._with_trials(ranked[:cut], ranked[cut:])
        if computed:
            _log.debug("%d of %d stored chunks are computed: %.0f ms", len(computed), len(stored), expected_s * 1e3)
        return LoadPlan(tuple(loaded), tuple(reversed(computed)), expected_s)

    def load_seconds(self, chunks: Sequence[StoredChunk]) -> float:
        """Return how long it takes to load `chunks`."""
        with self._lock:
            return sum(self._load_cost(chunk) for chunk in chunks)

    def compute_seconds(self, tokens: Sequence[int]) -> float:
        """Return how long it takes to compute chunks of so many tokens."""
        with self._lock:
            return sum(self._computing.cost.seconds(count) for count in tokens)

    def loaded(self, chunk: StoredChunk, started: float, ended: float) -> None:
        """Take in that a chunk was loaded between two times of one clock."""
        with self._lock:
            self._meter(chunk.place).add(chunk.nbytes, started, ended)

    def computed(self, tokens: int, seconds: float, pieces: int = 1) -> None:
        """Take in that `pieces` chunks of together `tokens` were computed, encoded and brought to memory."""
        with self._lock:
            self._computing.add(tokens, seconds, pieces)

    def costs(self) -> Mapping[str, Cost]:
        """Return what is known by now: seconds a load and a byte of each place, and a chunk and a token computed."""
        with self._lock:
            return {COMPUTING: self._computing.cost} | {place: meter.cost() for place, meter in self._loading.items()}

    def _with_trials(
        self, loaded: list[StoredChunk], computed: list[StoredChunk]
    ) -> tuple[list[StoredChunk], list[StoredChunk]]:
        """Return both, with one chunk of each place that was long passed over to be loaded first."""
        for place in {chunk.place for chunk in (*loaded, *computed)}:
            if any(chunk.place == place for chunk in loaded):
                self._passed_over[place] = 0
                continue
            self._passed_over[place] = self._passed_over.get(place, 0) + 1
            if self._passed_over[place] >= self._try_again:
                self._passed_over[place] = 0
                trial = next(chunk for chunk in computed if chunk.place == place)
                loaded = [trial, *loaded]
                computed = [chunk for chunk in computed if chunk is not trial]
        return loaded, computed

    def _load_cost(self, chunk: StoredChunk) -> float:
        return self._meter(chunk.place).cost().seconds(chunk.nbytes)

    def _compute_cost(self, chunk: StoredChunk) -> float:
        return self._computing.cost.seconds(len(chunk.ref.token_ids))

    def _meter(self, place: str) -> _LoadMeter:
        if place not in self._loading:
            self._loading[place] = _LoadMeter(_PRIORS.get(place, _REMOTE))
        return self._loading[place]


class _LoadMeter:
    """The cost of one kind of load, from loads that overlap."""

    def __init__(self, prior: Cost) -> None:
        self._model = CostModel(prior)
        self._last_end = 0.0
        self._pieces = 0
        self._bytes = 0
        self._busy_s = 0.0

    def cost(self) -> Cost:
        """Return the estimate from all loads so far."""
        if self._pieces:
            self._take_in()
        return self._model.cost

    def add(self, nbytes: int, started: float, ended: float) -> None:
        """Take in a load; loads are given in the order in which they end."""
        if started >= self._last_end and self._pieces:
            self._take_in()  # there was a pause: what ran before it is a measurement
        self._busy_s += max(ended - max(started, self._last_end), 0.0)
        self._last_end = max(ended, self._last_end)
        self._pieces += 1
        self._bytes += nbytes
        if self._pieces >= _TOGETHER:
            self._take_in()

    def _take_in(self) -> None:
        self._model.add(self._bytes, self._busy_s, self._pieces)
        self._pieces, self._bytes, self._busy_s = 0, 0, 0.0


def _cut(load_s: Sequence[float], compute_s: Sequence[float], must_s: float) -> tuple[int, float]:
    """Return how many chunks from the front to load, so that loading and computing end soonest, and when they do."""
    loading, computing = 0.0, must_s + sum(compute_s)
    ends = [max(loading, computing)]
    for load, compute in zip(load_s, compute_s, strict=True):
        loading, computing = loading + load, computing - compute
        ends.append(max(loading, computing))
    best = min(range(len(ends)), key=lambda count: (ends[count], -count))
    if ends[-1] * (1 - _LEAST_GAIN) <= ends[best]:
        best = len(load_s)
    return best, ends[best]
