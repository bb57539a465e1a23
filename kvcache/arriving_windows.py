"""Whole windows of a document on their way from disk to the device: some are read while those before are placed.

Threads read records and check them; on their way to a GPU they go into page-locked memory, a batch in one piece, which
the GPU copies from at full speed while the next batch is read into another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

_READERS = 8  # checking what was read takes longer than reading it
_BATCH_BYTES = 56 << 20  # with what stands around them below 64 MB: torch locks powers of two
_ALIGNMENT = 256  # bytes; what a GPU copies fastest from

Allocate: TypeAlias = Callable[[int], Tensor]
ReadWindow: TypeAlias = Callable[[int, Allocate], tuple[str, list[Tensor]]]


def arriving_windows(
    windows: range, window_bytes: int, read: ReadWindow, device: torch.device
) -> Iterator[tuple[range, list[tuple[str, list[Tensor]]]]]:
    """Yield neighbouring windows, a batch at a time, which holds until the next one is asked for.

    Args:
        windows: which ones.
        window_bytes: what one takes, about.
        read: gives where a window was found and the pieces of all its layers, in memory that it is given or its own.
        device: where the pieces go: before the next batch is asked for, copies to it have been launched.

    Raises:
        Whatever `read` does.
    """
    count = max(1, min(len(windows), _BATCH_BYTES // max(1, window_bytes)))
    spans = [range(start, min(start + count, windows.stop)) for start in range(windows.start, windows.stop, count)]
    batches = [_Batch(device, count * (window_bytes + window_bytes // 8 + _ALIGNMENT)) for _ in spans[:2]]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="ragkit-window-read") as readers:
        reading = [(batches[0], batches[0].begin(readers, spans[0], read))] if spans else []
        try:
            for number, span in enumerate(spans):
                batch, found = reading.pop()
                if number + 1 < len(spans):
                    following = batches[(number + 1) % 2]
                    reading.append((following, following.begin(readers, spans[number + 1], read)))
                yield span, [one.result() for one in found]
                batch.launched()
        finally:
            readers.shutdown(cancel_futures=True)
            for batch in batches[:1]:  # pieces that were in memory already may be written over when those let them go
                batch.launched()
                batch.wait()


class _Batch:
    """Memory of one batch, page-locked on the way to a GPU; it is written again when the GPU has copied from it."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._used = 0

    def begin(self, readers: ThreadPoolExecutor, span: Sequence[int], read: ReadWindow) -> list[Future]:  # type: ignore[type-arg]
        """Start to read the windows of `span`."""
        self.wait()
        self._used = 0
        return [readers.submit(read, window, self._allocate) for window in span]

    def launched(self) -> None:
        """Note that all copies of the batch are launched."""
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Return once the device has copied what was launched by then."""
        if self._copied is not None:
            self._copied.synchronize()

    def _allocate(self, nbytes: int) -> Tensor:
        if self._memory is None:
            return torch.empty(nbytes, dtype=torch.uint8)
        with self._lock:
            start = self._used
            self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        piece = self._memory[start : start + nbytes]
        return piece if len(piece) == nbytes else torch.empty(nbytes, dtype=torch.uint8)
