"""One request's chunks: what it holds, where they came from, and how long that took."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef, EncodedKV
from ragkit.kvcache.kv_segment import KVMissError, MissReason
from ragkit.kvcache.load_and_compute import COMPUTED, RECOMPUTED, Found, LoadAndCompute
from ragkit.kvcache.load_controller import StoredChunk
from ragkit.kvcache.memory_tier import PinnedKV
from ragkit.kvcache.pool_tier import PinnedBlocks

if TYPE_CHECKING:
    from ragkit.kvcache.kv_store import InFlight, KVStore

Compute = Callable[[Sequence[ChunkRef]], Sequence[ChunkKV]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchReport:
    """Where the chunks of one request came from.

    Attributes:
        hits: chunks found in some tier and taken from there.
        misses: chunks that had to be computed.
        holes: misses that stand before the last chunk that some tier had: a store that reuses prefixes only would end
            there.
        bytes_by_tier: bytes taken from each tier.
        load_ms: from the start until everything was found and loaded.
        compute_ms: time spent in computing, part of it beside the loads.
        recomputed: chunks that a tier had, and that were computed because that was sooner than loading them.
        damage: one line about the chunks whose stored KV was lacking, damaged or another one's; empty without any.
    """

    hits: int
    misses: int
    holes: int
    bytes_by_tier: Mapping[str, int]
    load_ms: float
    compute_ms: float
    recomputed: int = 0
    damage: str = ""


@dataclass(frozen=True, slots=True)
class FetchedKV:
    """The KV of a request's chunks, pinned until the block ends; in the order of the request.

    Attributes:
        chunks: each as its codec stores it, or decoded in blocks of the pool.
        report: where they came from.
    """

    chunks: tuple[EncodedKV | PinnedBlocks, ...]
    report: FetchReport


class Fetch:
    """One `KVStore.fetch`: what it holds, and what it counted."""

    def __init__(self, store: KVStore, compute: Compute) -> None:
        self._store = store
        self._compute = compute
        self._pins: dict[ChunkRef, PinnedKV | PinnedBlocks] = {}
        self._origin: dict[ChunkRef, str] = {}
        self._unusable: dict[ChunkRef, KVMissError] = {}  # the first that was wrong with each
        self._load_s = 0.0
        self._compute_s = 0.0

    def run(self, refs: Sequence[ChunkRef]) -> tuple[EncodedKV | PinnedBlocks, ...]:
        """Return the chunks, pinned."""
        wanted = list(dict.fromkeys(refs))
        while open_refs := [ref for ref in wanted if ref not in self._pins]:
            started = time.perf_counter()
            led: list[ChunkRef] = []
            try:
                awaited = self._take_or_lead(open_refs, led)
                self._bring(led, started)
            finally:
                for ref in led:  # whatever happened, nobody waits for us any longer
                    pin = self._pins.get(ref)
                    encoded = pin.encoded if isinstance(pin, PinnedKV) else None
                    self._store.settle(ref, encoded, self._store.memory.name)
            self._wait(awaited)
        pins = (self._pins[ref] for ref in refs)
        return tuple(pin.encoded if isinstance(pin, PinnedKV) else pin for pin in pins)

    def release(self) -> None:
        """Unpin everything."""
        pool = self._store.pool
        if pool is not None:
            pool.release_all([pin for pin in self._pins.values() if isinstance(pin, PinnedBlocks)])
        for pin in self._pins.values():
            if isinstance(pin, PinnedKV):
                pin.release()

    def report(self, refs: Sequence[ChunkRef]) -> FetchReport:
        """Return where the chunks came from."""
        bytes_by_tier: Counter[str] = Counter()
        for ref, origin in self._origin.items():
            if origin not in (COMPUTED, RECOMPUTED):
                bytes_by_tier[origin] += self._pins[ref].nbytes
        count = Counter(self._origin.values())
        misses, recomputed = count[COMPUTED], count[RECOMPUTED]
        was_there = [self._origin[ref] != COMPUTED for ref in dict.fromkeys(refs)]
        last_there = max((index for index, there in enumerate(was_there) if there), default=0)
        return FetchReport(
            hits=len(self._origin) - misses - recomputed,
            misses=misses,
            holes=was_there[:last_there].count(False),
            bytes_by_tier=dict(bytes_by_tier),
            load_ms=self._load_s * 1e3,
            compute_ms=self._compute_s * 1e3,
            recomputed=recomputed,
            damage=self._damage(),
        )

    def _take_or_lead(self, refs: Sequence[ChunkRef], led: list[ChunkRef]) -> dict[ChunkRef, InFlight]:
        """Pin what is in memory, add to `led` what this request has to bring, and return what others are bringing."""
        awaited: dict[ChunkRef, InFlight] = {}
        pool = self._store.pool
        if pool is not None:  # all at once: there are many, and the GPU waits for the host meanwhile
            for ref, pin in zip(refs, pool.pin_all(refs), strict=True):
                if pin is not None:
                    self._hold(ref, pin, pool.name)
        for ref in refs:
            if ref in self._pins or self._pin(ref):
                continue
            future, mine = self._store.lead(ref)
            if mine:
                led.append(ref)
            else:
                awaited[ref] = future
        # Another request may have brought a chunk between the look into memory and the lead.
        for ref in led:
            self._pin(ref)
        return awaited

    def _pin(self, ref: ChunkRef) -> bool:
        for tier in self._store.near:
            pin = tier.pin(ref)
            if pin is not None:
                self._hold(ref, pin, tier.name)
                return True
        return False

    def _hold(self, ref: ChunkRef, pin: PinnedKV | PinnedBlocks, origin: str) -> None:
        self._pins[ref] = pin
        self._origin[ref] = origin
        if origin not in (COMPUTED, RECOMPUTED):
            self._store.count_hit(origin)

    def _bring(self, led: Sequence[ChunkRef], started: float) -> None:
        """Load or compute the chunks that this request leads."""
        store = self._store
        todo = [ref for ref in led if ref not in self._pins]
        if not todo:
            return
        if not store.backing:
            self._compute_and_hold(todo, COMPUTED)
            return
        bringing = LoadAndCompute(todo, store.stored(todo), self._load, store.controller)
        bringing.start(store.loaders, store.load_threads)
        bringing.run(
            self._compute_and_hold, lambda ref, encoded, tier: self._hold(ref, store.memory.add(encoded), tier)
        )
        self._load_s += bringing.loads_ended - started

    def _load(self, ref: ChunkRef, expected: StoredChunk | None) -> Found:
        """Load one chunk; run by the loading threads."""

        def missed(tier: str, error: KVMissError) -> None:
            self._store.count_miss(tier, error)
            if error.reason is not MissReason.ABSENT:
                self._unusable.setdefault(ref, error)

        return self._store.load(ref, expected, missed)

    def _damage(self) -> str:
        """Return, and log, one line about all chunks whose stored KV could not be used."""
        unusable = dict(self._unusable)
        if not unusable:
            return ""
        first, count = next(iter(unusable.values())), len(unusable)
        computed = [self._origin.get(ref) in (COMPUTED, RECOMPUTED) for ref in unusable]
        ways = ["taken from elsewhere"] * (not all(computed)) + ["computed again"] * any(computed)
        place = f", {'the first ' * (count > 1)}in {first.place}," if first.place else ""
        line = (
            f"the stored KV of {count} chunk{'s' * (count > 1)}{place} cannot be used ({first}): "
            f"it is {' or '.join(ways)}"
        )
        _log.warning(line)
        return line

    def _compute_and_hold(self, refs: Sequence[ChunkRef], origin: str) -> None:
        started = time.perf_counter()
        computed = self._compute(refs)
        if len(computed) != len(refs):
            raise KVCacheError(f"{len(refs)} chunks were to be computed, {len(computed)} came back")
        took_ms = (time.perf_counter() - started) * 1e3
        tokens = sum(len(ref.token_ids) for ref in refs)
        for ref, chunk in zip(refs, computed, strict=True):
            encoded = self._store.keep(chunk, ref, took_ms * len(ref.token_ids) / max(tokens, 1), origin)
            self._hold(ref, self._store.memory.add(encoded), origin)
        spent = time.perf_counter() - started
        self._compute_s += spent
        if self._store.controller is not None:
            self._store.controller.computed(tokens, spent, len(refs))

    def _wait(self, awaited: Mapping[ChunkRef, InFlight]) -> None:
        """Wait for chunks that other requests bring; what they could not bring is tried again by the caller.

        For a prefetch that hangs in a slow tier no request waits longer than for computing the chunk.
        """
        started, computing_s = time.perf_counter(), self._compute_s
        controller = self._store.controller
        for ref, future in awaited.items():
            patience = None
            if controller is not None and future.is_prefetch:
                patience = controller.compute_seconds([len(ref.token_ids)])
            try:
                encoded, origin = future.result(patience)
            except CancelledError:
                continue
            except TimeoutError:
                self._compute_and_hold([ref], RECOMPUTED if self._store.stored([ref]) else COMPUTED)
                continue
            self._hold(ref, self._store.memory.add(encoded), origin)
        self._load_s += time.perf_counter() - started - (self._compute_s - computing_s)
