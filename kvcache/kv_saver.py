"""Writing chunk KV to the backing tiers: behind the requests, or at once where somebody waits for it."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence

from ragkit.errors import KVCacheError
from ragkit.kvcache.backing_tier import BackingTier
from ragkit.kvcache.chunk_kv import EncodedKV
from ragkit.kvcache.kv_segment import RECORD_OVERHEAD
from ragkit.kvcache.kv_stats import KVStoreStats

_SAVE_BATCH = 64  # chunks that one write takes together
_UNSAVED_BYTES = 1 << 30  # of chunks that wait to be written; more are not written

_log = logging.getLogger(__name__)


class KVSaver:
    """Writes chunks with a thread of its own, which never fails a request. Thread-safe.

    Args:
        tiers: where to.
        stats: counts what was saved.
    """

    def __init__(self, tiers: Sequence[BackingTier], stats: KVStoreStats) -> None:
        self._tiers = tuple(tiers)
        self._stats = stats
        self._lock = threading.Lock()
        self._unsaved: queue.Queue[EncodedKV | None] = queue.Queue()
        self._unsaved_bytes = 0
        self._has_warned = False  # since a chunk was last taken: a long prompt has many
        self._is_closed = False
        self._thread = threading.Thread(target=self._save_forever, name="ragkit-kv-save", daemon=True)
        self._thread.start()

    def enqueue(self, encoded: EncodedKV) -> None:
        """Have a chunk written later, unless too much waits already or nothing is written any more."""
        if not self._tiers:
            return
        with self._lock:
            is_closed, waiting = self._is_closed, self._unsaved_bytes + encoded.nbytes
            if not is_closed and waiting <= _UNSAVED_BYTES:
                self._unsaved_bytes = waiting
                self._has_warned = False
                self._unsaved.put(encoded)  # with the lock held: what comes behind the end would never be taken
                return
            self._stats.not_saved.update(tier.name for tier in self._tiers)
            is_first, self._has_warned = not self._has_warned, True
        if is_first:
            reason = "the store was closed" if is_closed else "too much waits to be written"
            _log.warning("KV of chunks stays in memory only: %s", reason)

    def write(self, chunks: Sequence[EncodedKV]) -> bool:
        """Write chunks now, as `KVStore.write` says."""
        needed = sum(chunk.nbytes + RECORD_OVERHEAD for chunk in chunks)
        kept = False
        for tier in self._tiers:
            if tier.bytes_used + needed <= tier.budget_bytes and tier.save(chunks) == len(chunks):
                self._count(tier, len(chunks), len(chunks))
                kept = True
        return kept

    def flush(self) -> None:
        """Return once everything so far is written, or was refused."""
        self._unsaved.join()

    def close(self) -> None:
        """Write what is unsaved and stop the thread."""
        with self._lock:
            self._is_closed = True
            self._unsaved.put(None)
        self._thread.join()

    def _save_forever(self) -> None:
        while True:
            batch = [self._unsaved.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < _SAVE_BATCH and batch[-1] is not None:
                    batch.append(self._unsaved.get_nowait())
            try:
                self._save([chunk for chunk in batch if chunk is not None])
            finally:
                with self._lock:
                    self._unsaved_bytes -= sum(chunk.nbytes for chunk in batch if chunk is not None)
                for _ in batch:
                    self._unsaved.task_done()
            if batch[-1] is None:
                return

    def _save(self, chunks: Sequence[EncodedKV]) -> None:
        for tier in self._tiers if chunks else ():
            try:
                kept = tier.save(chunks)
            except KVCacheError as error:
                kept = 0
                _log.warning("%d chunks stay in memory only: %s", len(chunks), error)
            except Exception:  # the thread must live on; the chunks are computed again when they are next needed
                kept = 0
                _log.exception("%d chunks could not be written to the tier %s", len(chunks), tier.name)
            self._count(tier, kept, len(chunks))

    def _count(self, tier: BackingTier, kept: int, given: int) -> None:
        with self._lock:
            self._stats.saved[tier.name] += kept
            self._stats.not_saved[tier.name] += given - kept
