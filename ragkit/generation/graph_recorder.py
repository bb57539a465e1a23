"""Records work on a device and does it again with one call: CUDA graphs, which cost the host one launch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

import torch

_log = logging.getLogger(__name__)
_recording = threading.Lock()  # one thread at a time


class _RecordingStreams(threading.local):
    """The streams that this thread records on, one a device.

    Torch hands out 32 streams in turn, whoever asks. With one for each recorder, a thread soon recorded on the stream
    on which another one launched its work, and both failed. Those of high priority hardly anybody else asks for.
    """

    def __init__(self) -> None:
        self._of: dict[int, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream for `device`, always the same one."""
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._of:
            self._of[index] = torch.cuda.Stream(index, priority=-1)
        return self._of[index]


_streams = _RecordingStreams()


class Recorder(Protocol):
    """Records work on a device, of one pass at a time."""

    def begin(self) -> None:
        """Have the pass that begins now wait on the device for the pass before it."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], object]:
        """Do `work` now, and return what does it again."""
        ...

    def end(self) -> None:
        """Note that the pass is launched."""
        ...

    def wait(self) -> None:
        """Return once the device has done the last pass."""
        ...


class GraphRecorder:
    """Records work as CUDA graphs, whose memory comes from one pool.

    Passes may come from streams of several threads: each waits for the one before it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._launched = torch.cuda.Event()
        self._failed = False

    def begin(self) -> None:
        """Have the current stream wait for the pass before it."""
        torch.cuda.current_stream(self._device).wait_event(self._launched)

    def record(self, work: Callable[[], None]) -> Callable[[], object]:
        """Do `work` now, and return what does it again: a graph, or plain launches where recording failed."""
        current, stream = torch.cuda.current_stream(self._device), _streams.of(self._device)
        with _recording:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                work()  # what a recording must not do, compiling kernels and opening libraries, is done now
                replay = work if self._failed else self._recorded(work)
            current.wait_stream(stream)
        return replay

    def end(self) -> None:
        """Note that the pass is launched."""
        self._launched.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Return once the device has done the last pass."""
        self._launched.synchronize()

    def _recorded(self, work: Callable[[], None]) -> Callable[[], object]:
        # Not by `torch.cuda.graph`: it waits for the device and empties the allocator's stock, in every layer.
        graph = torch.cuda.CUDAGraph()
        try:
            # Loads and copies of other threads go on meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        except RuntimeError as error:  # of the driver; the numbers are right already
            self._failed = True
            _log.warning("a CUDA graph could not be recorded, its work is launched step by step: %s", error)
            return work
        return graph.replay
