"""Encoded pages in host memory: of each window of a document one piece a layer, within a budget."""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

from ragkit.kvcache.chunk_kv import copy_bytes
from ragkit.kvcache.page_locked import PageLockedMemory

_Place = tuple[int, int]  # layer and window


class PageMemory:
    """Pieces of (pages, page_bytes) uint8; the one used longest ago leaves, unless it is held. Thread-safe.

    Args:
        budget_bytes: most bytes that it keeps; what is held stays beyond them.
        page_locked: whether the memory is one that a GPU copies from at full speed.

    Attributes:
        hits, misses: pieces that were asked for and were here, and that were not.
    """

    def __init__(self, budget_bytes: int, *, page_locked: bool = False) -> None:
        self.budget_bytes = budget_bytes
        self.hits = self.misses = 0
        self._page_locked = PageLockedMemory(budget_bytes) if page_locked else None
        self._lock = threading.Lock()
        self._pieces: OrderedDict[_Place, Tensor] = OrderedDict()
        self._held: set[int] = set()
        self._used = 0

    @property
    def bytes_used(self) -> int:
        """Bytes that it keeps now."""
        return self._used

    def get(self, layer: int, window: int) -> Tensor | None:
        """Return a piece, or None where it is not here."""
        with self._lock:
            piece = self._pieces.get((layer, window))
            if piece is None:
                self.misses += 1
                return None
            self._pieces.move_to_end((layer, window))
            self.hits += 1
            return piece

    def holds(self, layer: int, window: int) -> bool:
        """Return whether a piece is here, without counting a use."""
        return (layer, window) in self._pieces

    def put(self, layer: int, window: int, piece: Tensor) -> Tensor:
        """Keep a piece if there is room for it, and return it as it is kept."""
        piece = self._placed(piece)
        with self._lock:
            before = self._pieces.pop((layer, window), None)
            self._used += piece.nbytes - (0 if before is None else before.nbytes)
            self._pieces[layer, window] = piece
            self._shrink()
        return piece

    def hold(self, window: int) -> None:
        """Keep all pieces of a window, whatever the budget: nobody else has them yet."""
        with self._lock:
            self._held.add(window)

    def let_go(self, windows: range) -> None:
        """Let these windows leave again."""
        with self._lock:
            self._held.difference_update(windows)
            self._shrink()

    def discard(self, window: int) -> None:
        """Forget a window."""
        with self._lock:
            for place in [place for place in self._pieces if place[1] == window]:
                self._used -= self._pieces.pop(place).nbytes

    def _shrink(self) -> None:
        excess, leaving = self._used - self.budget_bytes, []
        for place, piece in self._pieces.items() if excess > 0 else ():
            if place[1] not in self._held:
                leaving.append(place)
                excess -= piece.nbytes
                if excess <= 0:
                    break
        for place in leaving:
            self._used -= self._pieces.pop(place).nbytes

    def _placed(self, piece: Tensor) -> Tensor:
        if self._page_locked is None:
            return piece if piece.device.type == "cpu" else piece.cpu()
        memory = self._page_locked.allocate(piece.nbytes)
        if memory is None:
            return piece.cpu()
        kept = memory.view(piece.shape)
        copy_bytes(piece, kept)
        return kept
