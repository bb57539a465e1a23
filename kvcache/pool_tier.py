"""Decoded chunk KV in blocks of the pool: on a GPU the nearest tier, whose blocks all requests share."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.errors import CacheCapacityError, KVCacheError
from ragkit.kernels.host_copy import to_device
from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef
from ragkit.kvcache.eviction import EvictionPolicy, EvictionQueue
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.pool import KVPool


@dataclass(frozen=True, slots=True, eq=False)
class DraftBytes:
    """The draft of a chunk (see `KVCodec.draft`) on the pool's device, as its codec stores it.

    Attributes:
        data: (bytes,) uint8.
        extents: start and stop in `data` of each layer.
    """

    data: Tensor
    extents: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PoolCandidate:
    """A chunk that may be kept in the pool.

    Attributes:
        ref: which chunk.
        recompute_ms: what computing it took; eviction weighs it.
        draft: gives its draft; called if the chunk is kept.
        draft_bytes: bytes that the draft will take.
    """

    ref: ChunkRef
    recompute_ms: float = 0.0
    draft: Callable[[], DraftBytes] | None = None
    draft_bytes: int = 0


class PinnedBlocks:
    """The blocks of one chunk, which keep their rows until `release`. A context manager.

    Attributes:
        pool: where they are.
        block_ids: the blocks in order, as `RequestKV.append_shared` takes them.
        num_tokens: rows that they hold.
        nbytes: bytes of these rows.
        draft: the chunk's draft, if it was kept with one.
    """

    def __init__(
        self, tier: PoolTier, ref: ChunkRef, block_ids: tuple[int, ...], draft: DraftBytes | None = None
    ) -> None:
        self.pool = tier.pool
        self.block_ids = block_ids
        self.num_tokens = len(ref.token_ids)
        self.nbytes = self.num_tokens * tier.pool.layout.bytes_per_token
        self.draft = draft
        self._tier: PoolTier | None = tier

    def release(self) -> None:
        """Let the blocks be used for something else. Releasing twice is harmless."""
        tier = self._tier
        if tier is not None:
            tier.release_all([self])

    def let_go(self) -> tuple[int, ...] | None:
        """Return the blocks the first time, None later: the tier asks for what it is to unpin."""
        tier, self._tier = self._tier, None
        return None if tier is None else self.block_ids

    def __enter__(self) -> PinnedBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Held:
    """One chunk in the tier."""

    __slots__ = ("block_ids", "draft", "draft_bytes", "ref")

    def __init__(self, ref: ChunkRef, block_ids: tuple[int, ...], draft_bytes: int) -> None:
        self.ref = ref
        self.block_ids = block_ids
        self.draft: DraftBytes | None = None
        self.draft_bytes = draft_bytes


class PoolTier:
    """Chunks in up to `max_blocks` blocks of a pool that requests use as well, and their drafts. Thread-safe.

    The tier holds each block once, every pin and every request once more, so evicting a chunk never takes rows away
    from who still reads them.

    Args:
        pool: where the blocks are.
        max_blocks: most blocks that it keeps.
        policy: which chunks leave first.
        name: how the tier is called in reports.
        budget_bytes: most bytes of these blocks and of the drafts, which lie beside the pool; None bounds the blocks
            alone.
    """

    def __init__(
        self,
        pool: KVPool,
        max_blocks: int,
        policy: EvictionPolicy,
        name: str = "gpu",
        *,
        budget_bytes: int | None = None,
    ) -> None:
        if not 0 <= max_blocks <= pool.num_blocks:
            raise KVCacheError(f"a tier of {max_blocks} blocks does not fit a pool of {pool.num_blocks}")
        self.pool = pool
        self.name = name
        self.max_blocks = max_blocks
        self._block_bytes = pool.block_size * pool.layout.bytes_per_token
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._is_closed = False
        pool.reclaim = self.give_back
        self._queue: EvictionQueue[KVKey] = EvictionQueue(policy)
        self._held: dict[KVKey, _Held] = {}
        self._pins: dict[tuple[int, ...], int] = {}
        self._blocks = 0
        self._draft_bytes = 0

    @property
    def bytes_used(self) -> int:
        """Bytes of the blocks that it keeps, whose last rows may be unused, and of the drafts."""
        return self._blocks * self._block_bytes + self._draft_bytes

    def pin(self, ref: ChunkRef) -> PinnedBlocks | None:
        """Return the chunk's blocks, or None where they are not here; a chunk of other tokens is not the one meant."""
        return self.pin_all([ref])[0]

    def pin_all(self, refs: Sequence[ChunkRef]) -> list[PinnedBlocks | None]:
        """Return what `pin` gives for each of `refs`: locks are taken once for all of them."""
        with self._lock:
            found = [self._found(ref) for ref in refs]
            self._retain([held.block_ids for held in found if held is not None])
        return [
            None if held is None else PinnedBlocks(self, ref, held.block_ids, held.draft)
            for ref, held in zip(refs, found, strict=True)
        ]

    def release_all(self, pins: Iterable[PinnedBlocks]) -> None:
        """Release `pins`, all of this tier: locks are taken once for all of them."""
        self.unpin([block_ids for pin in pins if (block_ids := pin.let_go()) is not None])

    def holds(self, ref: ChunkRef) -> bool:
        """Return whether the chunk is here, without counting a use."""
        held = self._held.get(ref.key)
        return held is not None and held.ref.token_ids == ref.token_ids

    def add(self, chunk: ChunkKV, ref: ChunkRef, recompute_ms: float = 0.0) -> PinnedBlocks | None:
        """Write a chunk into blocks and return them, or None where neither the tier nor the pool has room.

        Raises:
            KVCacheError: the chunk is not the one that `ref` names.
        """
        if (chunk.key, chunk.token_ids) != (ref.key, ref.token_ids):
            raise KVCacheError(f"the KV of {chunk.key} cannot be kept as that of {ref.key}")
        dtype, device = self.pool.layout.dtype, self.pool.device

        def write(kept: Sequence[int], slots: Tensor) -> None:
            for layer, (keys, values) in enumerate(chunk.layers):
                self.pool.keys[layer].flatten(0, 1)[slots] = keys.to(device, dtype)
                self.pool.values[layer].flatten(0, 1)[slots] = values.to(device, dtype)

        self.add_all([PoolCandidate(ref, recompute_ms)], write)
        return self.pin(ref)

    def add_all(self, candidates: Sequence[PoolCandidate], write: Callable[[Sequence[int], Tensor], None]) -> int:
        """Keep those of `candidates` that there is room for, others leaving for them, and return how many were added.

        Args:
            candidates: the chunks; those that are here already are left alone.
            write: called once with the indices of those that are to be written, and (rows,) int64 on the device: the
                rows of the pool, counted over blocks, for all of their tokens behind each other.
        """
        added: list[int] = []
        with self._lock:  # until the rows are written: nobody may pin the blocks before
            placed: list[_Held] = []  # pinned, so that they do not make room for one another
            try:
                for index, candidate in enumerate(candidates):
                    held = self._place(candidate)
                    if held is not None:
                        added.append(index)
                        placed.append(held)
                if added:
                    write(added, self._slots(placed))
                for index, held in zip(added, placed, strict=True):
                    self._keep_draft(candidates[index], held)
            except BaseException:
                self._forget(held.ref.key for held in placed)  # their rows may be unwritten
                raise
            finally:
                self._unpin([held.block_ids for held in placed])
        return len(added)

    def refs(self) -> list[ChunkRef]:
        """Return the references of all chunks that are here."""
        with self._lock:
            return [held.ref for held in self._held.values()]

    def reown(self, ref: ChunkRef, chunk_id: str) -> None:
        """Make the chunk belong to another chunk of the catalogue that has the same text."""
        with self._lock:
            held = self._held.get(ref.key)
            if held is not None and held.ref == ref:
                held.ref = dataclasses.replace(ref, chunk_id=chunk_id)

    def discard(self, keys: Iterable[KVKey]) -> None:
        """Forget these chunks; who has one pinned keeps its rows."""
        with self._lock:
            self._forget(keys)

    def close(self) -> None:
        """Give all blocks back to the pool but those that are pinned, which follow when they are released.

        What requests that still run would add is not kept.
        """
        with self._lock:
            self._is_closed = True
            if self.pool.reclaim == self.give_back:  # else the pool has a later tier
                self.pool.reclaim = None
            self._forget(self._held)

    def give_back(self, blocks: int) -> int:
        """Evict unpinned chunks until `blocks` blocks of the pool are free, and return how many are free then."""
        with self._lock:
            # Blocks that requests list stay taken when their chunk leaves, so one round may not be enough.
            while (missing := blocks - self.pool.num_free) > 0:
                leaving = self._queue.make_room(min(missing, self._unpinned_blocks()), self._is_unpinned)
                if not leaving:
                    break
                for key in leaving:
                    self._drop(key)
            return self.pool.num_free

    def unpin(self, chunks: Sequence[tuple[int, ...]]) -> None:
        """Give up one pin of each chunk, given by its blocks."""
        with self._lock:
            self._unpin(chunks)

    def _found(self, ref: ChunkRef) -> _Held | None:
        """Return the chunk, with one more use counted."""
        held = self._held.get(ref.key)
        if held is None or held.ref.token_ids != ref.token_ids:
            return None
        self._queue.use(ref.key)
        return held

    def _place(self, candidate: PoolCandidate) -> _Held | None:
        """Return a new entry with unwritten blocks, pinned; None where it is here already or there is no room."""
        ref, count = candidate.ref, self.pool.blocks_for(len(candidate.ref.token_ids))
        before = self._held.get(ref.key)
        if before is not None and before.ref.token_ids == ref.token_ids:
            return None
        if before is not None:  # a collision: the later one stays
            self._forget([ref.key])
        if self._is_closed or not count or not self._room(count, candidate.draft_bytes):
            return None
        try:
            block_ids = tuple(self.pool.allocate(count, reclaim=False))
        except CacheCapacityError:
            return None
        held = self._held[ref.key] = _Held(ref, block_ids, candidate.draft_bytes)
        self._blocks += count
        self._draft_bytes += held.draft_bytes  # now: the next ones must not take the room of a draft that comes later
        self._queue.add(ref.key, count, candidate.recompute_ms)
        self._retain([block_ids])
        return held

    def _slots(self, placed: Sequence[_Held]) -> Tensor:
        """Return (rows,) int64 on the device: the pool's row of each token of these chunks."""
        parts = [self.pool.rows_of(held.block_ids)[: len(held.ref.token_ids)] for held in placed]
        return to_device(torch.cat(parts), self.pool.device)

    def _keep_draft(self, candidate: PoolCandidate, held: _Held) -> None:
        if candidate.draft is not None:
            held.draft = candidate.draft()
            self._draft_bytes += held.draft.data.numel() - held.draft_bytes
            held.draft_bytes = held.draft.data.numel()

    def _retain(self, chunks: Sequence[tuple[int, ...]]) -> None:
        for blocks in _blocks_once(chunks):
            self.pool.retain(blocks)
        for block_ids in chunks:
            self._pins[block_ids] = self._pins.get(block_ids, 0) + 1

    def _unpin(self, chunks: Sequence[tuple[int, ...]]) -> None:
        for block_ids in chunks:
            self._pins[block_ids] -= 1
            if self._pins[block_ids] == 0:
                del self._pins[block_ids]
        for blocks in _blocks_once(chunks):
            self.pool.release(blocks)

    def _room(self, count: int, draft_bytes: int) -> bool:
        missing = max(self._blocks + count - self.max_blocks, count - self.pool.num_free)
        fits = count <= self.max_blocks
        if self.budget_bytes is not None:
            nbytes = count * self._block_bytes + draft_bytes
            # Drafts leave with their blocks: blocks for all of the bytes free enough.
            missing = max(missing, -(-(self.bytes_used + nbytes - self.budget_bytes) // self._block_bytes))
            fits = fits and nbytes <= self.budget_bytes
        if missing <= 0:
            return True
        leaving = self._queue.make_room(missing, self._is_unpinned) if fits else []
        for key in leaving:
            self._drop(key)
        return bool(leaving)

    def _unpinned_blocks(self) -> int:
        return sum(len(held.block_ids) for held in self._held.values() if held.block_ids not in self._pins)

    def _is_unpinned(self, key: KVKey) -> bool:
        return self._held[key].block_ids not in self._pins

    def _forget(self, keys: Iterable[KVKey]) -> None:
        for key in list(keys):
            if key in self._held:
                self._queue.remove(key)
                self._drop(key)

    def _drop(self, key: KVKey) -> None:
        held = self._held.pop(key)
        self._blocks -= len(held.block_ids)
        self._draft_bytes -= held.draft_bytes
        self.pool.release(held.block_ids)


def _blocks_once(chunks: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """Yield the blocks of all chunks; those of a chunk that is listed again in a list of their own."""
    rest = Counter(chunks)
    while rest:
        yield [block for block_ids in rest for block in block_ids]
        rest -= Counter(list(rest))
