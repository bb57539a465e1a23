"""Decoded chunk KV in blocks of the pool: on a GPU the nearest tier, whose blocks all requests share."""

from __future__ import annotations

import threading

import torch

from ragkit.errors import CacheCapacityError, KVCacheError
from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef
from ragkit.kvcache.eviction import EvictionPolicy, EvictionQueue
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.pool import KVPool


class PinnedBlocks:
    """The blocks of one chunk, which keep their rows until `release`. A context manager.

    Attributes:
        block_ids: the blocks in order, as `RequestKV.append_shared` takes them.
        num_tokens: rows that they hold.
    """

    def __init__(self, tier: PoolTier, ref: ChunkRef, block_ids: tuple[int, ...]) -> None:
        self.block_ids = block_ids
        self.num_tokens = len(ref.token_ids)
        self._ref = ref
        self._tier: PoolTier | None = tier

    def release(self) -> None:
        """Let the blocks be used for something else. Releasing twice is harmless."""
        tier, self._tier = self._tier, None
        if tier is not None:
            tier.unpin(self._ref, self.block_ids)

    def __enter__(self) -> PinnedBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class PoolTier:
    """Chunks in up to `max_blocks` blocks of a pool that requests use as well. Thread-safe.

    The tier holds each block once, every pin and every request once more, so evicting a chunk never takes rows away
    from who still reads them.

    Args:
        pool: where the blocks are.
        max_blocks: most blocks that it keeps.
        policy: which chunks leave first.
        name: how the tier is called in reports.
    """

    def __init__(self, pool: KVPool, max_blocks: int, policy: EvictionPolicy, name: str = "gpu") -> None:
        if not 0 <= max_blocks <= pool.num_blocks:
            raise KVCacheError(f"a tier of {max_blocks} blocks does not fit a pool of {pool.num_blocks}")
        self.pool = pool
        self.name = name
        self.max_blocks = max_blocks
        self._lock = threading.Lock()
        self._queue: EvictionQueue[KVKey] = EvictionQueue(policy)
        self._held: dict[KVKey, tuple[ChunkRef, tuple[int, ...]]] = {}
        self._pins: dict[tuple[int, ...], int] = {}
        self._blocks = 0

    @property
    def bytes_used(self) -> int:
        """Bytes of the blocks that it keeps, whose last rows may be unused."""
        return self._blocks * self.pool.block_size * self.pool.layout.bytes_per_token

    def pin(self, ref: ChunkRef) -> PinnedBlocks | None:
        """Return the chunk's blocks, or None where they are not here; a chunk of other tokens is not the one meant."""
        with self._lock:
            return self._pin(ref)

    def add(self, chunk: ChunkKV, ref: ChunkRef, recompute_ms: float = 0.0) -> PinnedBlocks | None:
        """Write a chunk into blocks and return them, or None where neither the tier nor the pool has room.

        Raises:
            KVCacheError: the chunk is not the one that `ref` names.
        """
        if (chunk.key, chunk.token_ids) != (ref.key, ref.token_ids):
            raise KVCacheError(f"the KV of {chunk.key} cannot be kept as that of {ref.key}")
        with self._lock:
            present = self._pin(ref)
            if present is not None:
                return present
            if ref.key in self._held:  # a collision: the later one stays
                self._queue.remove(ref.key)
                self._drop(ref.key)
            count = self.pool.blocks_for(chunk.num_tokens)
            if not count or not self._room(count):
                return None
            try:
                block_ids = tuple(self.pool.allocate(count))
            except CacheCapacityError:
                return None
            # Under the lock: nobody may pin the blocks before their rows are written.
            self._write(chunk, block_ids)
            self._held[ref.key] = (ref, block_ids)
            self._blocks += count
            self._queue.add(ref.key, count, recompute_ms)
            self._retain(block_ids)
            return PinnedBlocks(self, ref, block_ids)

    def give_back(self, blocks: int) -> int:
        """Evict unpinned chunks until `blocks` blocks of the pool are free, and return how many are free then."""
        with self._lock:
            missing = blocks - self.pool.num_free
            if missing > 0:
                for key in self._queue.make_room(missing, self._is_unpinned):
                    self._drop(key)
            return self.pool.num_free

    def unpin(self, ref: ChunkRef, block_ids: tuple[int, ...]) -> None:
        """Give up one pin; `PinnedBlocks.release` calls it once."""
        with self._lock:
            self._pins[block_ids] -= 1
            if self._pins[block_ids] == 0:
                del self._pins[block_ids]
            self.pool.release(block_ids)

    def _pin(self, ref: ChunkRef) -> PinnedBlocks | None:
        held = self._held.get(ref.key)
        if held is None or held[0].token_ids != ref.token_ids:
            return None
        self._queue.use(ref.key)
        self._retain(held[1])
        return PinnedBlocks(self, ref, held[1])

    def _retain(self, block_ids: tuple[int, ...]) -> None:
        self.pool.retain(block_ids)
        self._pins[block_ids] = self._pins.get(block_ids, 0) + 1

    def _room(self, count: int) -> bool:
        missing = max(self._blocks + count - self.max_blocks, count - self.pool.num_free)
        if missing <= 0:
            return True
        leaving = self._queue.make_room(missing, self._is_unpinned) if count <= self.max_blocks else []
        for key in leaving:
            self._drop(key)
        return bool(leaving)

    def _is_unpinned(self, key: KVKey) -> bool:
        return self._held[key][1] not in self._pins

    def _drop(self, key: KVKey) -> None:
        _, block_ids = self._held.pop(key)
        self._blocks -= len(block_ids)
        self.pool.release(block_ids)

    def _write(self, chunk: ChunkKV, block_ids: tuple[int, ...]) -> None:
        size, device = self.pool.block_size, self.pool.device
        rows = torch.arange(chunk.num_tokens)
        slots = (torch.tensor(block_ids)[rows // size] * size + rows % size).to(device)
        for layer, (keys, values) in enumerate(chunk.layers):
            self.pool.keys[layer].flatten(0, 1)[slots] = keys.to(device, self.pool.layout.dtype)
            self.pool.values[layer].flatten(0, 1)[slots] = values.to(device, self.pool.layout.dtype)
