"""Chunk KV that will be asked for soon, read from disks and other machines into memory before that.

Threads of its own read the chunks in the order in which they will be needed. They mostly wait: bytes are read and
compared with their checksums in calls that let go of the interpreter's lock, so a thread that launches kernels goes on
meanwhile, and nothing here makes torch begin a team of threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from functools import partial

from torch import Tensor

from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import PinnedKV

_THREADS = 2  # while one compares checksums the other one reads
_LET_GO_S = 10.0  # for which `close` waits for a read that hangs; it ends by itself and keeps nothing

_log = logging.getLogger(__name__)


class _NoRoomError(Exception):
    """Leaves a read whose bytes have no place now."""


class KVPrefetcher:
    """Keeps the chunks that are wanted next in memory. Thread-safe; ends with `close`.

    What is wanted is pinned once it is in memory, so that neither what comes behind it nor what others add drives it
    out before its use; pinned chunks and those that are being read never take more than `budget_bytes` together.
    Chunks that do not fit wait until others are no longer wanted, in order: nothing overtakes a chunk that is needed
    sooner. What cannot be read is passed over in silence: who asks for it meets the error.

    Args:
        store: where the chunks come from, and whose memory they are brought to.
        budget_bytes: most bytes of memory that they take.
        threads: how many read.
    """

    def __init__(self, store: KVStore, budget_bytes: int, threads: int = _THREADS) -> None:
        self._store = store
        self._budget = budget_bytes
        self._condition = threading.Condition()
        self._wanted: dict[ChunkRef, None] = {}  # in the order of their use
        self._kept: frozenset[ChunkRef] = frozenset()
        self._pins: dict[ChunkRef, PinnedKV] = {}
        self._reading: dict[ChunkRef, int] = {}  # bytes that are set aside for it
        self._sizes: dict[ChunkRef, int] = {}  # of chunks for which there was no room
        self._passed: set[ChunkRef] = set()  # nowhere, too large, or brought by somebody else
        self._bytes_a_token = 0.0  # the most that a chunk had
        self._is_closed = False
        self._num_threads = threads
        self._threads: list[threading.Thread] = []

    @property
    def bytes_held(self) -> int:
        """Bytes of memory that wanted chunks take, and that are set aside for those that are being read."""
        with self._condition:
            return sum(pin.nbytes for pin in self._pins.values()) + sum(self._reading.values())

    def want(self, refs: Iterable[ChunkRef], kept: Iterable[ChunkRef] = ()) -> None:
        """Bring `refs` into memory, the first one first, and hold them there; return at once.

        Whatever was wanted before and is not now may leave the memory.

        Args:
            refs: what is needed next; one may stand there twice.
            kept: what is being fetched now: it stays if it is here, and is not read.
        """
        with self._condition:
            if self._is_closed:
                return
            self._wanted, self._kept = dict.fromkeys(refs), frozenset(kept)
            for ref in [ref for ref in self._pins if not self._is_wanted(ref)]:
                self._pins.pop(ref).release()
            memory = self._store.memory
            self._passed = {ref for ref in self._passed if ref in self._wanted and not memory.holds(ref)}
            self._sizes = {ref: size for ref, size in self._sizes.items() if ref in self._wanted}
            if self._wanted and not self._threads:
                self._start()
            self._condition.notify_all()

    def close(self) -> None:
        """End the threads and let go of everything. Closing twice is harmless."""
        with self._condition:
            self._is_closed = True
            self._wanted, self._kept = {}, frozenset()
            self._condition.notify_all()
        for thread in self._threads:
            thread.join(_LET_GO_S)
        with self._condition:
            while self._pins:
                self._pins.popitem()[1].release()

    def _start(self) -> None:
        for _ in range(self._num_threads):
            thread = threading.Thread(target=self._work, name="ragkit-kv-prefetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (ref := self._next()) is not None:
            try:
                self._bring(ref)
            except _NoRoomError:
                self._end(ref)
            except Exception as error:  # the thread must live on; who asks for the chunk meets it again
                _log.debug("the KV of %s is not read ahead: %s", ref.key, error)
                self._end(ref, is_passed=True)

    def _next(self) -> ChunkRef | None:
        """Wait for a chunk to read, and set memory aside for it; None at the end."""
        with self._condition:
            while not self._is_closed:
                ref = self._first_open()
                if ref is not None:
                    self._reading[ref] = self._expected_bytes(ref)
                    return ref
                self._condition.wait()
            return None

    def _first_open(self) -> ChunkRef | None:
        if self._reading and not self._bytes_a_token:
            return None  # until the first one is read nobody knows how many fit
        for ref in self._wanted:
            if ref not in self._pins and ref not in self._reading and ref not in self._passed:
                return ref if self.bytes_held + self._expected_bytes(ref) <= self._budget else None
        return None

    def _expected_bytes(self, ref: ChunkRef) -> int:
        # At most all there is: by the most that a token took a chunk may be thought too large; reading it tells.
        return min(self._budget, self._sizes.get(ref, int(len(ref.token_ids) * self._bytes_a_token)))

    def _bring(self, ref: ChunkRef) -> None:
        pool = self._store.pool
        if pool is not None and pool.holds(ref):
            self._end(ref, is_passed=True)
            return
        brought = self._store.bring(ref, allocate=partial(self._allocate, ref))
        if isinstance(brought, PinnedKV):
            self._hold(ref, brought)
            return
        self._end(ref, is_passed=True)
        if brought is not None:  # somebody else is bringing it; then it need only be held
            brought.add_done_callback(lambda _: self._try_again(ref))

    def _allocate(self, ref: ChunkRef, nbytes: int) -> Tensor:
        self._set_aside(ref, nbytes)
        memory = self._store.memory
        data = memory.allocate(nbytes)
        if not memory.is_in_place(data):  # it would be copied, by as many threads as torch takes
            with self._condition:
                self._passed.add(ref)
            raise _NoRoomError
        return data

    def _set_aside(self, ref: ChunkRef, nbytes: int) -> None:
        """Set aside what a chunk really takes.

        Raises:
            _NoRoomError: that is too much now, or nobody wants the chunk any more.
        """
        with self._condition:
            self._bytes_a_token = max(self._bytes_a_token, nbytes / max(len(ref.token_ids), 1))
            has_room = self.bytes_held - self._reading[ref] + nbytes <= self._budget
            if not has_room or not self._is_wanted(ref):
                self._sizes[ref] = nbytes
                if nbytes > self._budget:
                    self._passed.add(ref)
                raise _NoRoomError
            self._reading[ref] = nbytes

    def _hold(self, ref: ChunkRef, pin: PinnedKV) -> None:
        try:
            self._set_aside(ref, pin.nbytes)  # it may have been in memory before
        except _NoRoomError:
            pin.release()
            raise
        with self._condition:
            del self._reading[ref]
            if pin.is_kept and self._is_wanted(ref):
                self._pins[ref] = pin
            else:
                pin.release()
                self._passed.add(ref)  # the memory is full of what others hold
            self._condition.notify_all()

    def _end(self, ref: ChunkRef, *, is_passed: bool = False) -> None:
        with self._condition:
            self._reading.pop(ref, None)
            if is_passed:
                self._passed.add(ref)
            self._condition.notify_all()

    def _try_again(self, ref: ChunkRef) -> None:
        with self._condition:
            self._passed.discard(ref)
            self._condition.notify_all()

    def _is_wanted(self, ref: ChunkRef) -> bool:
        return ref in self._wanted or ref in self._kept
