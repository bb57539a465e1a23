"""Whole windows of a document on their way from disk to the device: some are read while those before are placed.

Threads read records and check them, each into its row of a batch; on their way to a GPU batches are page-locked, and
the GPU copies one, in one piece and at full speed, while the next is read into the other. Several batches are handed on
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_READERS = 8  # checking what was read takes longer than reading it
_BATCH_BYTES = 64 << 20  # torch locks powers of two
_STAGED_BYTES = 512 << 20  # on the device, before they are placed
_STAGED_SHARE = 0.5  # of what is free there, at most: to place them takes memory as well
_ALIGNMENT = 256  # bytes; what a GPU copies fastest from

# Fills the memory of a window (bytes,) and says where it was found; threads take turns at what it calls of torch.
ReadWindow: TypeAlias = Callable[[int, Tensor], str]


class ArrivedWindows(NamedTuple):
    """Neighbouring windows on the device, until the next ones are asked for.

    Attributes:
        windows: which ones.
        places: where each was found.
        data: (windows, bytes) uint8; rows may be longer than what was read.
    """

    windows: range
    places: list[str]
    data: Tensor


def arriving_windows(
    windows: range, window_bytes: int, read: ReadWindow, device: torch.device
) -> Iterator[ArrivedWindows]:
    """Yield neighbouring windows, many at a time: what is done with them is launched in a few calls of torch then.

    Args:
        windows: which ones.
        window_bytes: what each takes.
        read: fills the memory of one.
        device: where they go. What is done with some is launched before the next are asked for.

    Raises:
        Whatever `read` does.
    """
    row = -(-window_bytes // _ALIGNMENT) * _ALIGNMENT
    count = min(len(windows), max(_READERS, _BATCH_BYTES // max(1, row)))
    spans = [range(start, min(start + count, windows.stop)) for start in range(windows.start, windows.stop, count or 1)]
    batches = [_Batch(device, count, row) for _ in spans[:2]]
    together = max(1, _most_staged(device) // max(1, count * row))
    staged = torch.empty((min(len(windows), together * count), row), dtype=torch.uint8, device=device)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="ragkit-window-read") as readers:

        def begin(batch: _Batch, span: range) -> tuple[_Batch, list[Future[str]]]:
            batch.wait()
            into = batch.memory[:, :window_bytes].unbind(0)
            return batch, [readers.submit(read, *one) for one in zip(span, into, strict=False)]

        reading = [begin(batches[0], spans[0])] if spans else []
        places: list[str] = []
        try:
            for number, span in enumerate(spans):
                batch, found = reading.pop()
                if number + 1 < len(spans):
                    reading.append(begin(batches[(number + 1) % 2], spans[number + 1]))
                first = len(places)
                places += [one.result() for one in found]
                staged[first : len(places)].copy_(batch.memory[: len(span)], non_blocking=True)
                batch.launched()
                if (number + 1) % together == 0 or number + 1 == len(spans):
                    yield ArrivedWindows(range(span.stop - len(places), span.stop), places, staged[: len(places)])
                    places = []
        finally:
            readers.shutdown(cancel_futures=True)
            for batch in batches[:1]:  # who asked may let the memory go, from which the last copies are under way
                batch.launched()
                batch.wait()


def _most_staged(device: torch.device) -> int:
    """Return the bytes of windows that the device holds before they are placed; beside pages little may be free."""
    if device.type != "cuda":
        return _STAGED_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(_STAGED_BYTES, int(free * _STAGED_SHARE))


class _Batch:
    """Memory of one batch, page-locked on the way to a GPU; it is written again when the GPU has copied from it.

    Attributes:
        memory: (windows, bytes) uint8.
    """

    def __init__(self, device: torch.device, windows: int, row_bytes: int) -> None:
        self.memory = torch.empty((windows, row_bytes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = device
        self._copied: torch.cuda.Event | None = None

    def launched(self) -> None:
        """Note that all copies of the batch are launched."""
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Return once the device has copied what was launched by then."""
        if self._copied is not None:
            self._copied.synchronize()
