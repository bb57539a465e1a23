"""Lets requests to the KV pool in while they fit beside each other; the others wait for their turn.

A batch has no place in the line: it takes blocks as it goes. It leaves alone what was promised to single requests, and
begins nothing new while one of them waits, so that room comes up as its answers end.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ragkit.errors import CacheCapacityError

_PATIENCE_S = 120.0


class Admission:
    """Admits requests in the order in which they come, while all that are admitted fit into `capacity` blocks.

    A request that is alone is always admitted, so what is larger than the pool fails by itself. So is one whose thread
    has another that is not finished: waiting for it would never end. Where no request ends for `patience_s` seconds the
    one that waits is let in as well, and the pool has the last word: somebody may keep a stream open for ever.

    Args:
        capacity: blocks of the pool that requests share.
        patience_s: how long to wait without any request ending.
        free: returns how many blocks are free, once tiers gave some back if that is fewer than it is given; asked while
            a batch takes part.
    """

    def __init__(
        self, capacity: int, patience_s: float = _PATIENCE_S, free: Callable[[int], int] | None = None
    ) -> None:
        self._capacity = capacity
        self._patience_s = patience_s
        self._free = free or (lambda wanted: capacity)
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._users: Counter[int] = Counter()  # admitted requests by the thread that began them
        self._batches: Counter[int] = Counter()  # batches likewise
        self._blocks = 0
        self._promised = 0  # of these, what is not taken from the pool yet
        self._planned: dict[BatchShare, int] = {}  # blocks that a batch's step is about to take
        self._ended = 0
        self._changes = 0

    @contextmanager
    def admitted(self, blocks: int) -> Iterator[AdmittedRequest]:
        """Wait until a request of `blocks` fits beside the others, and count it in until the block ends."""
        thread, ticket = threading.get_ident(), object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._wait(ticket, blocks, thread)
            finally:
                self._waiting.remove(ticket)
                self._note()  # it may be the turn of the next
            self._users[thread] += 1
            request = self._counted_in(blocks)
        try:
            yield request
        finally:
            self._count_out(request, blocks, Counter((thread,)))

    @contextmanager
    def spare(self, blocks: int) -> Iterator[AdmittedRequest]:
        """Count in `blocks` until the block ends, for what an admitted request can do without.

        Raises:
            CacheCapacityError: they do not fit beside the requests, or one of these waits.
        """
        with self._changed:
            fits = not self._waiting and self._blocks + blocks <= self._capacity
            if not fits or not self._fits_beside_batches(blocks):
                raise CacheCapacityError(
                    f"asked for {blocks} KV blocks that are spare, of {self._capacity} requests have {self._blocks} "
                    f"and {len(self._waiting)} more wait: end other requests, shorten the prompt or enlarge the pool"
                )
            request = self._counted_in(blocks)
        try:
            yield request
        finally:
            self._count_out(request, blocks, Counter())

    def join(self) -> BatchShare:
        """Return the part of a batch of this thread, until it is closed."""
        thread = threading.get_ident()
        with self._changed:
            self._batches[thread] += 1
        return BatchShare(self, thread)

    def _counted_in(self, blocks: int) -> AdmittedRequest:
        self._blocks += blocks
        self._promised += blocks
        return AdmittedRequest(self, blocks)

    def _count_out(self, request: AdmittedRequest, blocks: int, users: Counter[int]) -> None:
        request.has_taken()
        with self._changed:
            self._users -= users
            self._blocks -= blocks
            self._ended += 1
            self._note()

    def _wait(self, ticket: object, blocks: int, thread: int) -> None:
        while thread not in self._users and thread not in self._batches:
            fits = not self._users or self._blocks + blocks <= self._capacity
            if fits and self._waiting[0] is ticket and self._fits_beside_batches(blocks):
                return
            ended = self._ended
            if not self._changed.wait(self._patience_s) and self._ended == ended:
                return

    def _fits_beside_batches(self, blocks: int) -> bool:
        wanted = self._promised + sum(self._planned.values()) + min(blocks, self._capacity)
        return not self._batches or self._free(wanted) >= wanted

    def _note(self) -> None:
        self._changes += 1
        self._changed.notify_all()


@dataclass(slots=True)
class AdmittedRequest:
    """A request that was let in."""

    _admission: Admission
    _promised: int

    def has_taken(self) -> None:
        """Note that it has its blocks: what is free now is nobody's."""
        with self._admission._changed:
            self._admission._promised -= self._promised
            self._promised = 0


class BatchShare:
    """What a batch knows of the others; made by `Admission.join`."""

    def __init__(self, admission: Admission, thread: int) -> None:
        self._admission = admission
        self._thread = thread
        self._is_open = True
        self._seen = 0

    def free(self, wanted: int, kept: int) -> int:
        """Return how many blocks are free for the batch, once tiers gave some back if that is fewer than `wanted`.

        Where there are enough, `wanted` of them are set aside until `settle`.

        Args:
            wanted: what the step at hand takes in all.
            kept: blocks that are left to single requests, unless they have so many.
        """
        admission = self._admission
        with admission._changed:
            self._seen = admission._changes
            others = sum(blocks for share, blocks in admission._planned.items() if share is not self)
            left_alone = admission._promised + others + max(kept - admission._blocks, 0)
            free = admission._free(wanted + left_alone) - left_alone
            if free >= wanted:
                admission._planned[self] = max(wanted, admission._planned.get(self, 0))
            return free

    def settle(self) -> None:
        """Note that the step has taken its blocks."""
        with self._admission._changed:
            if self._admission._planned.pop(self, 0):
                self._admission._note()

    @property
    def others_wait(self) -> bool:
        """Whether a single request waits for blocks: nothing new should take any."""
        with self._admission._changed:
            self._seen = self._admission._changes
            return bool(self._admission._waiting)

    def gave_back(self) -> None:
        """Note that blocks are free again."""
        with self._admission._changed:
            self._admission._ended += 1
            self._admission._note()

    def wait(self) -> bool:
        """Wait until something has changed since the last look; False where nobody else could change anything."""
        admission = self._admission
        with admission._changed:
            if admission._changes != self._seen:
                return True
            users = {*admission._users, *admission._batches}
            if not admission._waiting and not users - {self._thread}:
                return False
            return admission._changed.wait_for(lambda: admission._changes != self._seen, admission._patience_s)

    def close(self) -> None:
        """Leave; doing so twice is harmless."""
        admission = self._admission
        with admission._changed:
            if self._is_open:
                self._is_open = False
                admission._planned.pop(self, None)
                admission._batches -= Counter((self._thread,))
                admission._ended += 1
                admission._note()
