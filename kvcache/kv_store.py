"""The chunk-KV store: finds a chunk in the nearest tier, computes what is nowhere, and keeps both in memory.

On a GPU the nearest tier is a part of the pool, where chunks lie decoded. What a request takes from host memory is
added there by the strategy that placed it (`BlendPrefill`), once nobody waits for it.

Whatever is wrong with a stored KV is a miss, counted and logged; the chunk is computed then, passes through the same
codec, and so gives the same numbers. No answer depends on what was found.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from ragkit.errors import KVCacheError
from ragkit.kvcache.backing_tier import BackingTier
from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef, EncodedKV
from ragkit.kvcache.codec import KVCodec, decode_chunk, encode_chunk
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_saver import KVSaver
from ragkit.kvcache.kv_segment import KVMissError, MissReason
from ragkit.kvcache.kv_stats import KVStoreStats
from ragkit.kvcache.memory_tier import MemoryTier, PinnedKV
from ragkit.kvcache.pool_tier import PinnedBlocks, PoolTier

COMPUTED = "computed"  # the origin of what no tier had

_log = logging.getLogger(__name__)

Compute = Callable[[Sequence[ChunkRef]], Sequence[ChunkKV]]
_Brought = tuple[EncodedKV, str]  # a chunk, and the tier that it comes from


@dataclass(frozen=True, slots=True)
class FetchReport:
    """Where the chunks of one request came from.

    Attributes:
        hits: chunks found in some tier.
        misses: chunks that had to be computed.
        holes: misses that stand before the last hit: a store that reuses prefixes only would end there.
        bytes_by_tier: bytes taken from each tier.
        load_ms, compute_ms: time spent in finding and loading, and in computing.
    """

    hits: int
    misses: int
    holes: int
    bytes_by_tier: Mapping[str, int]
    load_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True)
class FetchedKV:
    """The KV of a request's chunks, pinned until the block ends; in the order of the request.

    Attributes:
        chunks: each as its codec stores it, or decoded in blocks of the pool.
        report: where they came from.
    """

    chunks: tuple[EncodedKV | PinnedBlocks, ...]
    report: FetchReport


class KVStore:
    """Chunk KV in tiers. Thread-safe; a context manager.

    Two requests that miss the same chunk at once compute it once. What was computed is written to the backing tiers by
    a thread of its own; `flush` waits for it.

    Args:
        codec: what every chunk passes through before its first use.
        memory: the tier that requests use chunks from.
        backing: where else to look, in this order, and where computed chunks are kept.
        pool: decoded chunks on the GPU; looked into first.
        load_threads: how many chunks are loaded at once.
    """

    def __init__(
        self,
        codec: KVCodec,
        memory: MemoryTier,
        backing: Sequence[BackingTier] = (),
        *,
        pool: PoolTier | None = None,
        load_threads: int = 4,
    ) -> None:
        self.codec = codec
        self.memory = memory
        self.backing = tuple(backing)
        self.pool = pool
        self.stats = KVStoreStats()
        self._lock = threading.Lock()
        self._in_flight: dict[ChunkRef, Future[_Brought]] = {}
        self._loaders = ThreadPoolExecutor(load_threads, thread_name_prefix="ragkit-kv-load")
        self._saver = KVSaver(self.backing, self.stats)
        self._closed = False

    @contextlib.contextmanager
    def fetch(self, refs: Sequence[ChunkRef], compute: Compute) -> Iterator[FetchedKV]:
        """Give the KV of `refs`, pinned until the block ends; `compute` makes what no tier has.

        Args:
            refs: the chunks; one may stand there twice.
            compute: gets the missing ones and returns their KV in the same order.

        Raises:
            KVCacheError: the store is closed, or what was computed cannot be stored by the codec.
        """
        if self._closed:
            raise KVCacheError("the KV store is closed")
        request = _Request(self, compute)
        try:
            chunks = request.run(refs)
            yield FetchedKV(chunks, request.report(refs))
        finally:
            request.release()

    def decode(self, encoded: EncodedKV) -> ChunkKV:
        """Return keys and values in the model's type."""
        return decode_chunk(self.codec, encoded)

    def prefetch(self, refs: Sequence[ChunkRef]) -> None:
        """Start to bring chunks into memory and return at once: call it while the question is still being ranked.

        Chunks that are nowhere are left alone.
        """
        with contextlib.suppress(RuntimeError):  # the store was closed: nothing is to be expected any more
            for ref in self.missing(refs):
                self._loaders.submit(self._prefetch_one, ref)

    def missing(self, refs: Sequence[ChunkRef]) -> list[ChunkRef]:
        """Return those of `refs` that are not in memory."""
        return [ref for ref in refs if not any(tier.holds(ref) for tier in self.near)]

    def absent(self, refs: Sequence[ChunkRef]) -> list[ChunkRef]:
        """Return those of `refs` that no backing tier has.

        Raises:
            KVCacheError: a tier cannot be asked.
        """
        kept: set[KVKey] = set()
        for tier in self.backing:
            kept |= tier.holds([ref.key for ref in refs if ref.key not in kept])
        return [ref for ref in refs if ref.key not in kept]

    def encode(self, chunk: ChunkKV, ref: ChunkRef, recompute_ms: float) -> EncodedKV:
        """Return a computed chunk as the codec stores it.

        Raises:
            KVCacheError: it is another chunk, or the codec cannot store it.
        """
        if chunk.key != ref.key or chunk.token_ids != ref.token_ids:
            raise KVCacheError(f"the KV of {ref.key} was asked for, and that of {chunk.key} was computed")
        with self._lock:
            self.stats.computed += 1
        return encode_chunk(self.codec, chunk, ref.chunk_id, recompute_ms)

    def write(self, chunks: Sequence[EncodedKV]) -> bool:
        """Write chunks now to every backing tier that has room for all of them; return whether one kept them.

        Nothing is evicted for them.

        Raises:
            KVCacheError: a tier could not be written.
        """
        return self._saver.write(chunks)

    def flush(self) -> None:
        """Return once everything computed so far is written to the backing tiers, or was refused by them."""
        self._saver.flush()

    def bytes_by_tier(self) -> dict[str, int]:
        """Return the bytes that each tier holds."""
        tiers = (*self.near, *self.backing)
        return {tier.name: tier.bytes_used for tier in tiers}

    def refs(self) -> list[ChunkRef]:
        """Return the references of all chunks in memory, that of a GPU included."""
        return list(dict.fromkeys(ref for tier in self.near for ref in tier.refs()))

    def reown(self, ref: ChunkRef, chunk_id: str) -> None:
        """Make a chunk in memory belong to another chunk of the catalogue that has the same text."""
        for tier in self.near:
            tier.reown(ref, chunk_id)

    def discard(self, keys: Sequence[KVKey]) -> None:
        """Forget these chunks in memory, that of a GPU included; who has one pinned keeps it."""
        for tier in self.near:
            tier.discard(keys)

    @property
    def near(self) -> tuple[PoolTier | MemoryTier, ...]:
        """The tiers that requests use chunks from, the nearest first."""
        return (self.memory,) if self.pool is None else (self.pool, self.memory)

    def close(self) -> None:
        """Write what is unsaved, stop the threads and free the pool. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._loaders.shutdown(wait=True, cancel_futures=True)
        self._saver.close()
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, ref: ChunkRef) -> tuple[EncodedKV, str] | None:
        """Return a chunk from the first backing tier that has it, with the tier's name, or None."""
        for tier in self.backing:
            try:
                with tier.open(ref, self.codec.codec_id, self.codec.layout.num_layers) as reader:
                    return reader.load(self.memory.allocate), tier.name
            except KVMissError as error:
                with self._lock:
                    self.stats.misses[tier.name, error.reason] += 1
                if error.reason is not MissReason.ABSENT:
                    _log.warning("%s: it is computed again", error)
        return None

    def lead(self, ref: ChunkRef) -> tuple[Future[_Brought], bool]:
        """Return the future of a chunk that is being brought, and whether the caller is the one to bring it."""
        with self._lock:
            future = self._in_flight.get(ref)
            if future is not None:
                return future, False
            future = self._in_flight[ref] = Future()
            return future, True

    def settle(self, ref: ChunkRef, encoded: EncodedKV | None, origin: str) -> None:
        """End what `lead` began, and say to those who wait where the chunk comes from.

        None where it could not be brought, so that those who wait try themselves.
        """
        with self._lock:
            future = self._in_flight.pop(ref)
        if encoded is None:
            future.cancel()
        else:
            future.set_result((encoded, origin))

    def load_all(self, refs: Sequence[ChunkRef]) -> list[tuple[EncodedKV, str] | None]:
        """Return what `load` finds for each, several at once."""
        if len(refs) <= 1 or not self.backing:
            return [self.load(ref) for ref in refs]
        return list(self._loaders.map(self.load, refs))

    def keep(self, chunk: ChunkKV, ref: ChunkRef, recompute_ms: float) -> EncodedKV:
        """Return a computed chunk as the codec stores it, and have it written to the backing tiers."""
        encoded = self.encode(chunk, ref, recompute_ms)
        self._saver.enqueue(encoded)
        return encoded

    def count_hit(self, tier: str) -> None:
        """Count a chunk that was found."""
        with self._lock:
            self.stats.hits[tier] += 1

    def _prefetch_one(self, ref: ChunkRef) -> None:
        if self.memory.holds(ref):
            return
        _, mine = self.lead(ref)
        if not mine:
            return
        found = None
        try:
            found = self.load(ref)
            if found is not None:
                self.memory.add(found[0]).release()
                with self._lock:
                    self.stats.prefetched += 1
        finally:
            self.settle(ref, *(found or (None, "")))


class _Request:
    """One `fetch`: what it holds, and what it counted."""

    def __init__(self, store: KVStore, compute: Compute) -> None:
        self._store = store
        self._compute = compute
        self._pins: dict[ChunkRef, PinnedKV | PinnedBlocks] = {}
        self._origin: dict[ChunkRef, str] = {}
        self._load_s = 0.0
        self._compute_s = 0.0

    def run(self, refs: Sequence[ChunkRef]) -> tuple[EncodedKV | PinnedBlocks, ...]:
        """Return the chunks, pinned."""
        wanted = list(dict.fromkeys(refs))
        while open_refs := [ref for ref in wanted if ref not in self._pins]:
            started = time.perf_counter()
            led, awaited = self._take_or_lead(open_refs)
            try:
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
        for pin in self._pins.values():
            pin.release()

    def report(self, refs: Sequence[ChunkRef]) -> FetchReport:
        """Return where the chunks came from."""
        bytes_by_tier: Counter[str] = Counter()
        for ref, origin in self._origin.items():
            if origin != COMPUTED:
                bytes_by_tier[origin] += self._pins[ref].nbytes
        misses = sum(origin == COMPUTED for origin in self._origin.values())
        hits = len(self._origin) - misses
        was_hit = [self._origin[ref] != COMPUTED for ref in dict.fromkeys(refs)]
        last_hit = max((index for index, hit in enumerate(was_hit) if hit), default=0)
        holes = was_hit[:last_hit].count(False)
        return FetchReport(hits, misses, holes, dict(bytes_by_tier), self._load_s * 1e3, self._compute_s * 1e3)

    def _take_or_lead(self, refs: Sequence[ChunkRef]) -> tuple[list[ChunkRef], dict[ChunkRef, Future[_Brought]]]:
        """Pin what is in memory; return what this request has to bring, and what others are bringing."""
        led: list[ChunkRef] = []
        awaited: dict[ChunkRef, Future[_Brought]] = {}
        for ref in refs:
            if self._pin(ref):
                continue
            future, mine = self._store.lead(ref)
            if mine:
                led.append(ref)
            else:
                awaited[ref] = future
        # Another request may have brought a chunk between the look into memory and the lead.
        for ref in led:
            self._pin(ref)
        return led, awaited

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
        if origin != COMPUTED:
            self._store.count_hit(origin)

    def _bring(self, led: Sequence[ChunkRef], started: float) -> None:
        """Load or compute the chunks that this request leads."""
        todo = [ref for ref in led if ref not in self._pins]
        for ref, found in zip(todo, self._store.load_all(todo), strict=True):
            if found is not None:
                self._hold(ref, self._store.memory.add(found[0]), found[1])
        loaded = time.perf_counter()
        self._load_s += loaded - started
        todo = [ref for ref in todo if ref not in self._pins]
        if not todo:
            return
        computed = self._compute(todo)
        if len(computed) != len(todo):
            raise KVCacheError(f"{len(todo)} chunks were to be computed, {len(computed)} came back")
        took_ms = (time.perf_counter() - loaded) * 1e3
        tokens = max(sum(len(ref.token_ids) for ref in todo), 1)
        for ref, chunk in zip(todo, computed, strict=True):
            encoded = self._store.keep(chunk, ref, took_ms * len(ref.token_ids) / tokens)
            self._hold(ref, self._store.memory.add(encoded), COMPUTED)
        self._compute_s += time.perf_counter() - loaded

    def _wait(self, awaited: Mapping[ChunkRef, Future[_Brought]]) -> None:
        """Wait for chunks that other requests bring; what they could not bring is tried again by the caller."""
        started = time.perf_counter()
        for ref, future in awaited.items():
            try:
                encoded, origin = future.result()
            except CancelledError:
                continue
            self._hold(ref, self._store.memory.add(encoded), origin)
        self._load_s += time.perf_counter() - started
