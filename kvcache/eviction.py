"""Which chunk leaves a full tier first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ragkit.config import PolicyName
from ragkit.errors import KVCacheError

Key = TypeVar("Key", bound=Hashable)

_HALF_LIFE = 10_000  # uses of the tier after which an old use counts half


@dataclass(slots=True)
class Usage:
    """How one chunk has been used.

    Attributes:
        nbytes: bytes that it takes.
        cost: what it takes to have it again, in any unit that all chunks share (milliseconds of computing).
        uses: how often it was used, the first time included.
        weight: the logarithm of its uses where later ones count more.
    """

    nbytes: int
    cost: float
    uses: int = 0
    weight: float = -math.inf


class EvictionPolicy(Protocol):
    """Gives chunks a priority when they are used; the lowest leaves first."""

    def priority(self, usage: Usage, clock: int) -> float:
        """Return the priority of a chunk that is used at `clock`, the number of uses of the whole tier."""
        ...

    def evicted(self, priority: float) -> None:
        """Hear that a chunk of this priority had to leave."""
        ...


class LeastRecentlyUsed:
    """The chunk that was used longest ago leaves."""

    def priority(self, usage: Usage, clock: int) -> float:
        """Return the time of the use."""
        return float(clock)

    def evicted(self, priority: float) -> None:
        """Do nothing."""


class LeastFrequentlyUsed:
    """The chunk with the fewest uses leaves, among equals the one that was used longest ago."""

    def priority(self, usage: Usage, clock: int) -> float:
        """Return the number of uses, with the time behind the point."""
        return usage.uses + clock * 2.0**-32

    def evicted(self, priority: float) -> None:
        """Do nothing."""


class GreedyDualSizeFrequency:
    """Cost times uses over bytes, raised by the priority of what left last, so that old favourites age.

    Source: Cherkasova, HP Labs HPL-98-69R1; RAGCache (arXiv 2404.12457, section 5.1) ranks prefixes so.
    """

    def __init__(self) -> None:
        self._age = 0.0

    def priority(self, usage: Usage, clock: int) -> float:
        """Return the age of the tier plus cost times uses over bytes."""
        return self._age + usage.uses * _density(usage)

    def evicted(self, priority: float) -> None:
        """Age the tier."""
        self._age = max(self._age, priority)


class CostTimesFrequency:
    """Recompute cost times recent frequency over bytes: the time that the chunk's bytes are expected to save.

    A use counts half after `half_life` uses of the tier. Weights are kept forward-decayed (Cormode et al., ICDE 2009):
    a later use weighs more instead of an earlier one less, so priorities stay comparable without touching them.
    """

    def __init__(self, half_life: int = _HALF_LIFE) -> None:
        self._rate = math.log(2) / half_life

    def priority(self, usage: Usage, clock: int) -> float:
        """Return the logarithm of cost times frequency over bytes."""
        now = self._rate * clock
        high, low = max(usage.weight, now), min(usage.weight, now)
        usage.weight = high + math.log1p(math.exp(low - high))
        return usage.weight + math.log(_density(usage))

    def evicted(self, priority: float) -> None:
        """Do nothing: time is the decay."""


_POLICIES: dict[PolicyName, Callable[[], EvictionPolicy]] = {
    PolicyName.COST: CostTimesFrequency,
    PolicyName.GDSF: GreedyDualSizeFrequency,
    PolicyName.LFU: LeastFrequentlyUsed,
    PolicyName.LRU: LeastRecentlyUsed,
}


def make_policy(name: str) -> EvictionPolicy:
    """Return a fresh policy; each tier has one of its own.

    Raises:
        KVCacheError: there is no such policy.
    """
    if name not in list(PolicyName):
        raise KVCacheError(f"there is no eviction policy {name!r}; there are {', '.join(PolicyName)}")
    return _POLICIES[PolicyName(name)]()


class EvictionQueue(Generic[Key]):
    """The chunks of one tier in the order in which they would leave. Not thread-safe: the tier holds its lock."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._clock = 0
        self._usage: dict[Key, Usage] = {}
        self._last_use: dict[Key, int] = {}  # by the clock: what a heap's item must be of
        self._heap: list[tuple[float, int, Key]] = []  # with outdated items, which `make_room` drops

    def __len__(self) -> int:
        return len(self._usage)

    def add(self, key: Key, nbytes: int, cost: float) -> None:
        """Count the first use of a chunk."""
        self._usage[key] = Usage(max(nbytes, 1), cost)
        self.use(key)

    def use(self, key: Key) -> None:
        """Count one more use."""
        usage = self._usage[key]
        self._clock += 1
        usage.uses += 1
        priority = self._policy.priority(usage, self._clock)
        self._last_use[key] = self._clock
        heapq.heappush(self._heap, (priority, self._clock, key))
        if len(self._heap) > 4 * len(self._usage) + 64:
            self._heap = [item for item in self._heap if self._is_current(item)]
            heapq.heapify(self._heap)

    def remove(self, key: Key) -> None:
        """Forget a chunk that left by itself."""
        del self._usage[key], self._last_use[key]

    def make_room(self, nbytes: int, may_leave: Callable[[Key], bool]) -> list[Key]:
        """Return the chunks that leave so that `nbytes` become free, in their order; they are forgotten.

        Where those that may leave are too few, nothing leaves and the list is empty.
        """
        leaving: list[tuple[float, int, Key]] = []
        staying: list[tuple[float, int, Key]] = []
        freed = 0
        while freed < nbytes and self._heap:
            item = heapq.heappop(self._heap)
            if self._is_current(item):
                leaves = may_leave(item[2])
                (leaving if leaves else staying).append(item)
                freed += self._usage[item[2]].nbytes if leaves else 0
        if freed < nbytes:
            staying, leaving = staying + leaving, []
        for item in staying:
            heapq.heappush(self._heap, item)
        for priority, _, key in leaving:
            self._policy.evicted(priority)
            self.remove(key)
        return [key for _, _, key in leaving]

    def _is_current(self, item: tuple[float, int, Key]) -> bool:
        return self._last_use.get(item[2]) == item[1]


def _density(usage: Usage) -> float:
    return max(usage.cost, 1e-9) / usage.nbytes
