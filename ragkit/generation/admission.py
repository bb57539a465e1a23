"""Lets requests to the KV pool in while they fit beside each other; the others wait for their turn."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_S = 120.0


class Admission:
    """Admits requests in the order in which they come, while all that are admitted fit into `capacity` blocks.

    A request that is alone is always admitted, so what is larger than the pool fails by itself. So is one whose thread
    has another that is not finished: waiting for it would never end. Where no request ends for `patience_s` seconds the
    one that waits is let in as well, and the pool has the last word: somebody may keep a stream open for ever.

    Args:
        capacity: blocks of the pool that requests share.
        patience_s: how long to wait without any request ending.
    """

    def __init__(self, capacity: int, patience_s: float = _PATIENCE_S) -> None:
        self._capacity = capacity
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._users: Counter[int] = Counter()  # admitted requests by the thread that began them
        self._blocks = 0
        self._ended = 0

    @contextmanager
    def admitted(self, blocks: int) -> Iterator[None]:
        """Wait until a request of `blocks` fits beside the others, and count it in until the block ends."""
        thread, ticket = threading.get_ident(), object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._wait(ticket, blocks, thread)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()  # it may be the turn of the next
            self._users[thread] += 1
            self._blocks += blocks
        try:
            yield
        finally:
            with self._changed:
                self._users -= Counter((thread,))
                self._blocks -= blocks
                self._ended += 1
                self._changed.notify_all()

    def _wait(self, ticket: object, blocks: int, thread: int) -> None:
        while thread not in self._users:
            fits = not self._users or self._blocks + blocks <= self._capacity
            if fits and self._waiting[0] is ticket:
                return
            ended = self._ended
            if not self._changed.wait(self._patience_s) and self._ended == ended:
                return
