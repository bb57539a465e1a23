"""The chunk-KV store: finds a chunk in the nearest tier, computes what is nowhere, and keeps both in memory.

On a GPU the nearest tier is a part of the pool, where chunks lie decoded. What a request takes from host memory is
added there by the strategy that placed it (`BlendPrefill`), once nobody waits for it.

Whatever is wrong with a stored KV is a miss, counted and told once a request; the chunk is computed then, passes
through the same codec, and so gives the same numbers. No answer depends on what was found. What a far tier had is
copied to those before it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.backing_tier import BackingTier
from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef, EncodedKV
from ragkit.kvcache.codec import KVCodec, decode_chunk, encode_chunk
from ragkit.kvcache.fetch import Compute, Fetch, FetchedKV
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_saver import KVSaver
from ragkit.kvcache.kv_segment import KVMissError
from ragkit.kvcache.kv_stats import KVStoreStats
from ragkit.kvcache.load_and_compute import RECOMPUTED
from ragkit.kvcache.load_controller import LoadController, StoredChunk
from ragkit.kvcache.memory_tier import MemoryTier, PinnedKV
from ragkit.kvcache.pool_tier import PoolTier

_Brought = tuple[EncodedKV, str]  # a chunk, and the tier that it comes from


class InFlight(Future[_Brought]):
    """A chunk that somebody is bringing.

    Attributes:
        is_prefetch: whether it is only loaded, with nobody waiting for it yet.
    """

    def __init__(self, is_prefetch: bool) -> None:
        super().__init__()
        self.is_prefetch = is_prefetch


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
        controller: decides which stored chunks are computed because that is sooner; None loads all of them.
    """

    def __init__(
        self,
        codec: KVCodec,
        memory: MemoryTier,
        backing: Sequence[BackingTier] = (),
        *,
        pool: PoolTier | None = None,
        load_threads: int = 4,
        controller: LoadController | None = None,
    ) -> None:
        self.codec = codec
        self.memory = memory
        self.backing = tuple(backing)
        self.pool = pool
        self.stats = KVStoreStats()
        self._lock = threading.Lock()
        self.controller = controller
        self.load_threads = load_threads
        self._in_flight: dict[ChunkRef, InFlight] = {}
        self.loaders = ThreadPoolExecutor(load_threads, thread_name_prefix="ragkit-kv-load")
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
        request = Fetch(self, compute)
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

        Chunks that are nowhere are left alone, and so are those that are computed sooner than loaded.
        """
        wanted = self.missing(refs)
        stored = self.stored(wanted)
        declined: set[ChunkRef] = set()
        if self.controller is not None:
            declined = {chunk.ref for chunk in self.controller.plan(list(stored.values())).compute}
        with contextlib.suppress(RuntimeError):  # the store was closed: nothing is to be expected any more
            for ref in wanted:
                if ref not in declined:
                    self.loaders.submit(self._prefetch_one, ref, stored.get(ref))

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
        self.loaders.shutdown(wait=True, cancel_futures=True)
        self._saver.close()
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stored(self, refs: Sequence[ChunkRef]) -> dict[ChunkRef, StoredChunk]:
        """Return those of `refs` that a backing tier says it has, by what is known without asking other machines.

        Nothing without a controller: nobody else needs to know.
        """
        found: dict[ChunkRef, StoredChunk] = {}
        for tier in self.backing if self.controller is not None else ():
            wanted = [ref for ref in refs if ref not in found]
            records = tier.known([ref.key for ref in wanted])
            for ref in wanted:
                record = records.get(ref.key)
                if record is not None:
                    found[ref] = StoredChunk(ref, tier.name, record.nbytes, record.is_cached)
        return found

    def load(
        self,
        ref: ChunkRef,
        expected: StoredChunk | None = None,
        missed: Callable[[str, KVMissError], None] | None = None,
        allocate: Callable[[int], Tensor] | None = None,
    ) -> _Brought | None:
        """Return a chunk from the first backing tier that has it, with the tier's name, or None.

        What it took is measured if the chunk was where it was expected. The tiers before that are given a copy later:
        its checksums and token ids have been compared.

        Args:
            ref: the chunk.
            expected: where it should be.
            missed: hears of each tier that has no usable record, and why.
            allocate: gives the host memory for so many bytes; that of the memory tier unless given.
        """
        started = time.perf_counter()
        for index, tier in enumerate(self.backing):
            try:
                with tier.open(ref, self.codec.codec_id, self.codec.layout.num_layers) as reader:
                    encoded = reader.load(allocate or self.memory.allocate)
            except KVMissError as error:
                if missed is not None:
                    missed(tier.name, error)
                continue
            self._saver.enqueue(encoded, self.backing[:index])
            if self.controller is not None and expected is not None and expected.tier == tier.name:
                self.controller.loaded(expected, started, time.perf_counter())
            return encoded, tier.name
        return None

    def bring(
        self, ref: ChunkRef, expected: StoredChunk | None = None, allocate: Callable[[int], Tensor] | None = None
    ) -> PinnedKV | InFlight | None:
        """Bring a chunk into memory with nobody waiting for it, and return it pinned.

        Where somebody else is bringing it, that is returned, and None where no tier has it. What is wrong with a
        record is passed over in silence: whoever asks for the chunk meets it and says so.
        """
        pin = self.memory.pin(ref, is_use=False)
        if pin is not None:
            return pin
        future, mine = self.lead(ref, is_prefetch=True)
        if not mine:
            return future
        origin = self.memory.name
        try:
            pin = self.memory.pin(ref, is_use=False)  # another request may have brought it before the lead
            found = self.load(ref, expected, allocate=allocate) if pin is None else None
            if found is not None:
                encoded, origin = found
                pin = self.memory.add(encoded)
                with self._lock:
                    self.stats.prefetched += 1
            return pin
        finally:
            self.settle(ref, None if pin is None else pin.encoded, origin)

    def lead(self, ref: ChunkRef, *, is_prefetch: bool = False) -> tuple[InFlight, bool]:
        """Return the future of a chunk that is being brought, and whether the caller is the one to bring it."""
        with self._lock:
            future = self._in_flight.get(ref)
            if future is not None:
                return future, False
            future = self._in_flight[ref] = InFlight(is_prefetch)
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

    def keep(self, chunk: ChunkKV, ref: ChunkRef, recompute_ms: float, origin: str) -> EncodedKV:
        """Return a computed chunk as the codec stores it, and have it written to the backing tiers if none had it."""
        encoded = self.encode(chunk, ref, recompute_ms)
        if origin != RECOMPUTED:
            self._saver.enqueue(encoded)
            return encoded
        with self._lock:
            self.stats.recomputed += 1
        return encoded

    def count_miss(self, tier: str, error: KVMissError) -> None:
        """Count a tier that had no usable record of a chunk."""
        with self._lock:
            self.stats.misses[tier, error.reason] += 1

    def count_hit(self, tier: str) -> None:
        """Count a chunk that was found."""
        with self._lock:
            self.stats.hits[tier] += 1

    def _prefetch_one(self, ref: ChunkRef, expected: StoredChunk | None) -> None:
        brought = self.bring(ref, expected)
        if isinstance(brought, PinnedKV):
            brought.release()
