"""Writing chunk KV to the backing tiers: behind the requests, or at once where somebody waits for it.

What was computed goes to all tiers, and what came from a far one to those before it, so that it is fetched once and not
by every process.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ragkit.errors import KVCacheError
from ragkit.kvcache.backing_tier import BackingTier
from ragkit.kvcache.chunk_kv import EncodedKV
from ragkit.kvcache.kv_segment import RECORD_OVERHEAD
from ragkit.kvcache.kv_stats import KVStoreStats

_SAVE_BATCH = 64  # chunks that one write takes together
_UNSAVED_BYTES = 1 << 30  # of chunks that wait to be written; more are not written

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Unsaved:
    """A chunk that waits to be written to `tiers`; `is_copy` where another tier keeps it as well."""

    encoded: EncodedKV
    tiers: tuple[BackingTier, ...]
    is_copy: bool


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
        self._unsaved: queue.Queue[_Unsaved | None] = queue.Queue()
        self._unsaved_bytes = 0
        self._has_warned = False  # since a chunk was last taken: a long prompt has many
        self._refusing: set[str] = set()  # tiers whose last write failed: it is said once, until one succeeds
        self._is_closed = False
        self._thread = threading.Thread(target=self._save_forever, name="ragkit-kv-save", daemon=True)
        self._thread.start()

    def enqueue(self, encoded: EncodedKV, copy_to: Sequence[BackingTier] | None = None) -> None:
        """Have a chunk written later, unless too much waits already or nothing is written any more.

        Args:
            encoded: a chunk whose numbers were computed, or compared with their checksums.
            copy_to: the tiers that lack a chunk which a tier behind them has; None for all tiers.
        """
        tiers = self._tiers if copy_to is None else tuple(copy_to)
        if not tiers:
            return
        unsaved = _Unsaved(encoded, tiers, copy_to is not None)
        with self._lock:
            is_closed, waiting = self._is_closed, self._unsaved_bytes + encoded.nbytes
            if not is_closed and waiting <= _UNSAVED_BYTES:
                self._unsaved_bytes = waiting
                self._has_warned = False
                self._unsaved.put(unsaved)  # with the lock held: what comes behind the end would never be taken
                return
            self._stats.not_saved.update(tier.name for tier in tiers)
            is_first, self._has_warned = not self._has_warned, True
        if is_first:
            reason = "the store was closed" if is_closed else "too much waits to be written"
            _log.warning("KV of chunks %s: %s", "is not copied" if unsaved.is_copy else "stays in memory only", reason)

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
                self._save([one for one in batch if one is not None])
            finally:
                with self._lock:
                    self._unsaved_bytes -= sum(one.encoded.nbytes for one in batch if one is not None)
                for _ in batch:
                    self._unsaved.task_done()
            if batch[-1] is None:
                return

    def _save(self, batch: Sequence[_Unsaved]) -> None:
        for tier in dict.fromkeys(tier for one in batch for tier in one.tiers):
            mine = [one for one in batch if tier in one.tiers]
            try:
                kept = tier.save([one.encoded for one in mine])
                self._refusing.discard(tier.name)
            except Exception as error:  # the thread must live on; what is lacking is computed or fetched again
                kept = 0
                self._warn(tier, mine, error)
            self._count(tier, kept, len(mine))

    def _warn(self, tier: BackingTier, chunks: Sequence[_Unsaved], error: Exception) -> None:
        is_first = tier.name not in self._refusing
        self._refusing.add(tier.name)
        level = logging.WARNING if is_first else logging.DEBUG
        left_out = _left_out(all(one.is_copy for one in chunks), tier)
        known = isinstance(error, KVCacheError)
        _log.log(level, "%d chunks %s: %s", len(chunks), left_out, error, exc_info=None if known else error)

    def _count(self, tier: BackingTier, kept: int, given: int) -> None:
        with self._lock:
            self._stats.saved[tier.name] += kept
            self._stats.not_saved[tier.name] += given - kept


def _left_out(is_copy: bool, tier: BackingTier) -> str:
    """Return what becomes of chunks that a tier does not keep."""
    return f"are not copied to the tier {tier.name}" if is_copy else "stay in memory only"
