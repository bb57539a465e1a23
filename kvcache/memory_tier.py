"""Encoded chunk KV in memory: of the host, pinned where a GPU copies from it, or of a GPU."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.eviction import EvictionPolicy, EvictionQueue
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.page_locked import PageLockedMemory

_log = logging.getLogger(__name__)


class _Held:
    """One chunk in the tier, and how many requests are using it."""

    __slots__ = ("encoded", "pins")

    def __init__(self, encoded: EncodedKV) -> None:
        self.encoded = encoded
        self.pins = 0


class PinnedKV:
    """A chunk that stays where it is until `release`. A context manager.

    Attributes:
        encoded: the chunk.
    """

    def __init__(self, encoded: EncodedKV, tier: MemoryTier | None = None, held: _Held | None = None) -> None:
        self.encoded = encoded
        self._tier = tier
        self._held = held

    @property
    def nbytes(self) -> int:
        """Bytes that the chunk takes."""
        return self.encoded.nbytes

    @property
    def is_kept(self) -> bool:
        """Whether a tier keeps it: where there was no room, it is only handed out."""
        return self._held is not None

    def release(self) -> None:
        """Let the tier evict the chunk again. Releasing twice is harmless."""
        tier, held, self._tier, self._held = self._tier, self._held, None, None
        if tier is not None and held is not None:
            tier.unpin(held)

    def __enter__(self) -> PinnedKV:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class MemoryTier:
    """Chunks in memory up to `budget_bytes`. Thread-safe.

    A pinned chunk is never evicted. Where everything is pinned, or a chunk is larger than the budget, the chunk is
    handed out without being kept, so a request never fails for want of room here. A chunk that is replaced (its key
    collided) while pinned counts until its last pin is released.

    Args:
        name: how the tier is called in reports.
        budget_bytes: most bytes that it keeps.
        policy: which chunk leaves first.
        device: where the bytes lie.
        page_locked: whether host memory is locked for copies by a GPU; or the memory that chunks take pieces of.
    """

    def __init__(
        self,
        name: str,
        budget_bytes: int,
        policy: EvictionPolicy,
        device: torch.device | None = None,
        *,
        page_locked: bool | PageLockedMemory = False,
    ) -> None:
        if budget_bytes < 0:
            raise KVCacheError(f"the tier {name} needs a budget of 0 bytes or more, got {budget_bytes}")
        self.name = name
        self.budget_bytes = budget_bytes
        self._device = device or torch.device("cpu")
        self._page_locked = PageLockedMemory(budget_bytes) if page_locked is True else page_locked or None
        self._lock = threading.Lock()
        self._held: dict[KVKey, _Held] = {}
        self._queue: EvictionQueue[KVKey] = EvictionQueue(policy)
        self._used = 0
        self.evictions = 0
        self.collisions = 0

    @property
    def bytes_used(self) -> int:
        """Bytes that it keeps now."""
        return self._used

    def __len__(self) -> int:
        return len(self._held)

    def allocate(self, nbytes: int) -> Tensor:
        """Return unwritten (nbytes,) uint8 host memory of the tier's kind, to read a chunk into without a copy."""
        piece = self._page_locked.allocate(nbytes) if self._page_locked is not None else None
        return torch.empty(nbytes, dtype=torch.uint8) if piece is None else piece

    def is_in_place(self, data: Tensor) -> bool:
        """Return whether a chunk in this host memory is kept as it lies, without a copy."""
        return self._page_locked is None or self._page_locked.owns(data)

    def pin(self, ref: ChunkRef, *, is_use: bool = True) -> PinnedKV | None:
        """Return the chunk, pinned, or None where it is not here; a chunk of other tokens is not the one meant.

        Eviction counts it as a use, unless it is only to stay for one that is to come.
        """
        with self._lock:
            held = self._held.get(ref.key)
            if held is None:
                return None
            if held.encoded.ref.token_ids != ref.token_ids:
                self.collisions += 1
                _log.warning("the KV key %s stands for other tokens in the tier %s: a miss", ref.key, self.name)
                return None
            if is_use:
                self._queue.use(ref.key)
            held.pins += 1
            return PinnedKV(held.encoded, self, held)

    def holds(self, ref: ChunkRef) -> bool:
        """Return whether the chunk is here, without counting a use."""
        held = self._held.get(ref.key)
        return held is not None and held.encoded.ref.token_ids == ref.token_ids

    def add(self, encoded: EncodedKV) -> PinnedKV:
        """Keep a chunk if there is room, and return it pinned; an equal one that is here already is returned."""
        present = self.pin(encoded.ref) if self.holds(encoded.ref) else None
        if present is not None:
            return present
        placed = self._placed(encoded)
        with self._lock:
            key = encoded.ref.key
            before = self._held.get(key)
            if before is not None and before.encoded.ref.token_ids == encoded.ref.token_ids:
                self._queue.use(key)  # another thread was faster
                before.pins += 1
                return PinnedKV(before.encoded, self, before)
            if before is not None:
                self._queue.remove(key)
                self._drop(key)
            if not self._make_room(placed.nbytes):
                return PinnedKV(placed)
            held = self._held[key] = _Held(placed)
            held.pins = 1
            self._used += placed.nbytes
            self._queue.add(key, placed.nbytes, placed.recompute_ms)
            return PinnedKV(placed, self, held)

    def refs(self) -> list[ChunkRef]:
        """Return the references of all chunks that are here."""
        with self._lock:
            return [held.encoded.ref for held in self._held.values()]

    def reown(self, ref: ChunkRef, chunk_id: str) -> None:
        """Make the chunk belong to another chunk of the catalogue that has the same text."""
        with self._lock:
            held = self._held.get(ref.key)
            if held is not None and held.encoded.ref == ref:
                owned = dataclasses.replace(ref, chunk_id=chunk_id)
                held.encoded = dataclasses.replace(held.encoded, ref=owned)

    def discard(self, keys: Iterable[KVKey]) -> None:
        """Forget these chunks; who has one pinned keeps it."""
        with self._lock:
            for key in keys:
                if key in self._held:
                    self._queue.remove(key)
                    self._drop(key)

    def unpin(self, held: _Held) -> None:
        """Give up one pin; `PinnedKV.release` calls it once."""
        with self._lock:
            held.pins -= 1
            if held.pins == 0 and self._held.get(held.encoded.ref.key) is not held:
                self._used -= held.encoded.nbytes  # it was replaced or discarded meanwhile

    def _placed(self, encoded: EncodedKV) -> EncodedKV:
        if self._page_locked is None:
            data = encoded.data.to(self._device)
        elif self._page_locked.owns(encoded.data):
            data = encoded.data
        else:
            data = self.allocate(encoded.nbytes).copy_(encoded.data)
        if data is encoded.data:
            return encoded
        return dataclasses.replace(encoded, data=data)

    def _make_room(self, nbytes: int) -> bool:
        if nbytes > self.budget_bytes:
            return False
        missing = self._used + nbytes - self.budget_bytes
        if missing <= 0:
            return True
        leaving = self._queue.make_room(missing, lambda key: self._held[key].pins == 0)
        for key in leaving:
            self._drop(key)
        self.evictions += len(leaving)
        return bool(leaving)

    def _drop(self, key: KVKey) -> None:
        held = self._held.pop(key)
        if held.pins == 0:
            self._used -= held.encoded.nbytes
