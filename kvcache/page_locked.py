"""Page-locked host memory, which a GPU copies from at full speed: few large slabs that many chunks share.

Locking pages takes the system about a quarter of a second a gigabyte, and torch's own allocator rounds every request
up to a power of two. So slabs are locked once, and chunks take pieces of them, the first that fits (Knuth, The Art of
Computer Programming, volume 1, section 2.5).
"""

from __future__ import annotations

import bisect
import ctypes
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ragkit.errors import KVCacheError

SLAB_BYTES = 1 << 30
_ALIGNMENT = 256  # bytes; what a GPU copies fastest from

_log = logging.getLogger(__name__)

_Piece = tuple[int, int, int]  # slab, start and stop within it


class PageLockedMemory:
    """Hands out pieces of page-locked memory. Thread-safe.

    A piece becomes free by itself when the last tensor over it is gone, views included: whoever still writes a chunk
    to a disk or copies it keeps its bytes, although the chunk may have left its tier. For those, and for gaps, there
    is one slab more than `budget_bytes` need.

    Args:
        budget_bytes: what all chunks together may take.
        slab_bytes: size of a slab.
        new_slab: gives the memory of a slab, (bytes,) uint8; page-locked memory of torch unless given.
    """

    def __init__(
        self, budget_bytes: int, slab_bytes: int = SLAB_BYTES, new_slab: Callable[[int], Tensor] | None = None
    ) -> None:
        if budget_bytes < 0 or slab_bytes < 1:
            raise KVCacheError(f"page-locked memory of {budget_bytes} bytes in slabs of {slab_bytes} cannot be had")
        self._slab_bytes = max(_ALIGNMENT, min(slab_bytes, _aligned(budget_bytes)))
        self._most_bytes = budget_bytes + self._slab_bytes
        self._new_slab = new_slab or _locked_slab
        self._lock = threading.Lock()
        self._slabs: list[Tensor] = []
        self._holes: list[_Piece] = []  # ascending
        # Filled by finalisers, which may run while this very thread holds the lock, so it is emptied elsewhere.
        self._freed: deque[_Piece] = deque()
        self._is_short = False

    @property
    def bytes_locked(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.numel() for slab in self._slabs)

    @property
    def bytes_free(self) -> int:
        """Bytes of the slabs that nobody holds."""
        with self._lock:
            self._take_back()
            return sum(stop - start for _, start, stop in self._holes)

    def allocate(self, nbytes: int) -> Tensor | None:
        """Return unwritten (nbytes,) uint8 memory, or None where no gap is large enough and no slab may be added."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        with self._lock:
            self._take_back()
            piece = self._first_fit(_aligned(nbytes)) or self._from_new_slab(_aligned(nbytes))
            if piece is None:
                if not self._is_short:
                    _log.warning("no page-locked memory is left for %d bytes: copies to the GPU are slower", nbytes)
                self._is_short = True
                return None
            slab = self._slabs[piece[0]]
        buffer = (ctypes.c_uint8 * nbytes).from_address(slab.data_ptr() + piece[1])
        # The tensor's storage holds the buffer, so this runs when the last view is gone; until then the slab lives.
        weakref.finalize(buffer, _give_back, self._freed, piece, slab).atexit = False
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def owns(self, data: Tensor) -> bool:
        """Return whether `data` lies in this memory."""
        if data.device.type != "cpu":
            return False
        address = data.data_ptr()
        return any(slab.data_ptr() <= address < slab.data_ptr() + slab.numel() for slab in self._slabs)

    def _first_fit(self, nbytes: int) -> _Piece | None:
        for index, (slab, start, stop) in enumerate(self._holes):
            if stop - start >= nbytes:
                if stop - start == nbytes:
                    del self._holes[index]
                else:
                    self._holes[index] = (slab, start + nbytes, stop)
                return slab, start, start + nbytes
        return None

    def _from_new_slab(self, nbytes: int) -> _Piece | None:
        size = max(self._slab_bytes, nbytes)
        if self.bytes_locked + size > self._most_bytes:
            return None
        try:
            self._slabs.append(self._new_slab(size))
        except RuntimeError as error:  # the system locks no more: a request must not fail for that
            _log.warning("the system gives no %d bytes of page-locked memory: %s", size, error)
            self._most_bytes = self.bytes_locked
            return None
        if size > nbytes:
            self._holes.append((len(self._slabs) - 1, nbytes, size))
        return len(self._slabs) - 1, 0, nbytes

    def _take_back(self) -> None:
        while self._freed:
            slab, start, stop = self._freed.popleft()
            at = bisect.bisect(self._holes, (slab, start, stop))
            if at < len(self._holes) and self._holes[at][:2] == (slab, stop):
                stop = self._holes.pop(at)[2]
            if at and (self._holes[at - 1][0], self._holes[at - 1][2]) == (slab, start):
                at -= 1
                start = self._holes.pop(at)[1]
            self._holes.insert(at, (slab, start, stop))


def _give_back(freed: deque[_Piece], piece: _Piece, slab: Tensor) -> None:
    freed.append(piece)


def _locked_slab(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
