"""The encoded windows of one document where they are kept: in memory, within a budget, and on disk."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.arriving_windows import arriving_windows
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV, copy_bytes, packed_extents
from ragkit.kvcache.kv_segment import KVMissError, MissReason
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.page_grid import PageGrid
from ragkit.kvcache.page_memory import PageMemory
from ragkit.kvcache.page_records import PageRecords
from ragkit.kvcache.page_window import DamagedWindowError

MEMORY, DISK = "ram", "disk"  # how the places of encoded pages are called in reports

_log = logging.getLogger(__name__)

Extents: TypeAlias = tuple[tuple[int, int], ...]


class EncodedWindows:
    """Pieces (pages, page_bytes) uint8 of one window in one layer.

    Args:
        codec: how pages are stored.
        refs: the windows, in order.
        grid: how they are cut into pages.
        memory: those in memory.
        records: those on disk.

    Attributes:
        stored: windows that are on disk, whole or not.
        nbytes: bytes that were read from each place.
        next_window: the window behind those that were there or were added, in order.
    """

    def __init__(
        self, codec: PageCodec, refs: Sequence[ChunkRef], grid: PageGrid, memory: PageMemory, records: PageRecords
    ) -> None:
        self.stored = records.present(refs)
        self.nbytes = {MEMORY: 0, DISK: 0}
        self.next_window = self.first_gap(0)
        self._counting = threading.Lock()
        self._codec = codec
        self._refs = refs
        self._grid = grid
        self._memory = memory
        self._records = records
        self._layers = codec.layout.num_layers
        self._unwritten: deque[int] = deque()
        self._coming: ComingWindow | None = None
        self._spare: Tensor | None = None  # memory that the last window came into
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="ragkit-page-load")
        self._loading: set[tuple[int, int]] = set()

    def first_gap(self, window: int) -> int:
        """Return the first window from `window` on that is not on disk."""
        while window in self.stored:
            window += 1
        return window

    def add(self, window: int, pieces: Sequence[Tensor], recompute_ms: float) -> int:
        """Keep the pieces of all layers of a window; return the first window that is not on disk yet."""
        self.next_window = window
        self._memory.hold(window)
        packed = self._packed(window, pieces, recompute_ms)
        return self._write(window, packed)

    def expect(self, window: int, data: Tensor, recompute_ms: float) -> int:
        """Keep a window that the device has not computed yet, when the next one is expected or `settle` is called.

        So the host stores one window while the device computes the next.

        Args:
            window: its number.
            data: (bytes,) uint8, the pages of all layers behind each other; it may be written again after this.
            recompute_ms: what computing it takes.

        Returns:
            The first window that is not on disk yet; 0 where that is not known.

        Raises:
            KVCacheError: the window before it cannot be stored, or the disk could not be written; then neither is kept.
        """
        self.next_window = window if self._coming is None else self._coming.window
        coming = ComingWindow.of(window, data, recompute_ms, self._spare)
        self._spare = None
        first = self.settle()
        self._coming = coming
        return first

    def settle(self) -> int:
        """Keep the window that is expected, if one is; return the first one that is not on disk yet, 0 without.

        Raises:
            KVCacheError: it cannot be stored, or the disk could not be written.
        """
        coming, self._coming = self._coming, None
        if coming is None:
            return 0
        self.next_window = coming.window
        coming.wait()
        pages, pieces, start = len(self._grid.pages_of(coming.window)), [], 0
        for layer in range(self._layers):
            stop = start + pages * self._codec.page_bytes(layer)
            pieces.append(coming.data[start:stop])
            self._codec.require_finite(layer, pieces[layer].view(pages, -1))
            start = stop
        # The device has its pages, so nobody asks memory for them before they are on disk.
        packed = EncodedKV.pack(self._refs[coming.window], self._codec.codec_id, pieces, coming.recompute_ms)
        self._spare = coming.data
        return self._write(coming.window, packed)

    def replace(self, window: int, pieces: Sequence[Tensor], recompute_ms: float) -> None:
        """Keep a window again that was damaged; memory holds it until it is let go."""
        self._memory.discard(window)
        self._memory.hold(window)
        self._records.write(self._packed(window, pieces, recompute_ms))

    def piece(self, layer: int, window: int) -> Tensor:
        """Return the bytes of one window in one layer.

        Raises:
            DamagedWindowError: it cannot be read.
        """
        return self._counted(self._piece(layer, window))

    def pieces(self, layer: int, windows: Sequence[int]) -> dict[int, Tensor]:
        """Return what `piece` does of several windows; the system brings those that memory does not have side by side.

        They are read by this thread alone: several, which check what they read, take longer to take turns at the
        interpreter than to read what the system has in its cache.

        Raises:
            DamagedWindowError: one cannot be read.
        """
        for window in windows:
            if not self._memory.holds(layer, window):
                self._records.will_read(self._refs[window], layer)
        return {window: self.piece(layer, window) for window in windows}

    def whole(self, windows: range, device: torch.device) -> Iterator[tuple[range, Tensor, Extents]]:
        """Yield whole windows, many neighbours at a time; memory keeps none.

        What is yielded holds until the next is asked for: which windows, (windows, bytes) uint8 on the device, and
        start and stop of each layer within a row.

        Raises:
            DamagedWindowError: one cannot be read.
        """
        last = len(self._refs) - 1  # it may have fewer pages than the others
        for alike in (range(windows.start, min(windows.stop, last)), range(max(windows.start, last), windows.stop)):
            if alike:
                extents = self._extents(alike.start)
                read = partial(self._read_whole, extents)
                for some, places, data in arriving_windows(alike, extents[-1][1], read, device):
                    for place in places:
                        self.nbytes[place] += sum(stop - start for start, stop in extents)
                    yield some, data, extents

    def read_ahead(self, layer: int, windows: Sequence[int]) -> Future[None] | None:
        """Start to read from disk what memory does not have of a layer; None where that is nothing."""
        places = [(layer, window) for window in windows if not self._memory.holds(layer, window)]
        places = [place for place in places if place not in self._loading]
        if not places:
            return None
        self._loading.update(places)
        return self._loader.submit(self._load, places)

    def flush(self) -> None:
        """Write what is not written yet.

        Raises:
            KVCacheError: the disk could not be written.
        """
        self._records.flush()
        self._unwritten.clear()

    def stop(self) -> None:
        """End reading ahead."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    def _write(self, window: int, packed: EncodedKV) -> int:
        """Have a window written; return the first one that is not on disk yet."""
        self.next_window = window + 1
        self._unwritten.append(window)
        waiting = self._records.write(packed)
        while len(self._unwritten) > waiting:
            self._unwritten.popleft()
        return self._unwritten[0] if self._unwritten else self.next_window

    def _counted(self, found: tuple[str, Tensor]) -> Tensor:
        place, piece = found
        with self._counting:
            self.nbytes[place] += piece.nbytes
        return piece

    def _piece(self, layer: int, window: int) -> tuple[str, Tensor]:
        """Return where the bytes of one window in one layer were found, and them."""
        found = self._memory.get(layer, window)
        if found is not None:
            return MEMORY, found
        try:
            data = self._records.layer(self._refs[window], layer)
        except KVMissError as error:
            raise DamagedWindowError(window, error) from error
        return DISK, self._memory.put(layer, window, self._shaped(layer, window, data))

    def _packed(self, window: int, pieces: Sequence[Tensor], recompute_ms: float) -> EncodedKV:
        kept = [self._memory.put(layer, window, piece) for layer, piece in enumerate(pieces)]
        flat = [piece.flatten() for piece in kept]
        return EncodedKV.pack(self._refs[window], self._codec.codec_id, flat, recompute_ms)

    def _extents(self, window: int) -> Extents:
        """Return where the layers of a window lie in its record."""
        pages = len(self._grid.pages_of(window))
        return packed_extents([pages * self._codec.page_bytes(layer) for layer in range(self._layers)])

    def _read_whole(self, extents: Extents, window: int, row: Tensor) -> str:
        """Fill (bytes,) uint8 with the layers of a window, and return where they were found."""
        if all(self._memory.holds(layer, window) for layer in range(self._layers)):
            held = [self._memory.get(layer, window) for layer in range(self._layers)]
            pieces = [piece.flatten() for piece in held if piece is not None]
            if len(pieces) == self._layers:  # none left meanwhile
                _place(pieces, extents, row)
                return MEMORY
        try:
            record = self._records.load(self._refs[window], lambda size: row if size == len(row) else _bytes(size))
        except KVMissError as error:
            raise DamagedWindowError(window, error) from error
        if record.extents != extents:  # copies: they may lie in the row itself, where one would write over the next
            layers = [self._shaped(layer, window, record.layer(layer).clone()) for layer in range(self._layers)]
            _place([layer.flatten() for layer in layers], extents, row)
        return DISK

    def _shaped(self, layer: int, window: int, data: Tensor) -> Tensor:
        pages = len(self._grid.pages_of(window))
        if data.numel() != pages * self._codec.page_bytes(layer):
            short = KVMissError(MissReason.SHORT, f"window {window} has {data.numel()} bytes in layer {layer}")
            raise DamagedWindowError(window, short)
        return data.view(pages, -1)

    def _load(self, places: Sequence[tuple[int, int]]) -> None:
        for layer, window in places:
            try:
                if not self._memory.holds(layer, window):
                    self.piece(layer, window)
            except KVCacheError as error:  # whoever needs the page finds out, and has it computed again
                _log.info("window %d of a document was not read ahead: %s", window, error)
            finally:
                self._loading.discard((layer, window))


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


def _place(pieces: Sequence[Tensor], extents: Extents, row: Tensor) -> None:
    for piece, (start, stop) in zip(pieces, extents, strict=True):
        copy_bytes(piece, row[start:stop])


class ComingWindow(NamedTuple):
    """A window on its way from the device.

    Attributes:
        window: its number.
        data: (bytes,) uint8 in host memory, page-locked where a GPU copies into it.
        recompute_ms: what computing it takes.
        arrived: says when it is there; None where it is.
    """

    window: int
    data: Tensor
    recompute_ms: float
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, window: int, data: Tensor, recompute_ms: float, into: Tensor | None) -> ComingWindow:
        """Begin to bring a window, into memory that may be there already."""
        if not data.is_cuda:
            return cls(window, data.clone(), recompute_ms, None)
        if into is None or into.numel() != data.numel():
            into = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
        into.copy_(data, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(data.device))
        return cls(window, into, recompute_ms, arrived)

    def wait(self) -> None:
        """Return when its bytes are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
