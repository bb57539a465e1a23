"""Reads many sources at once, in order, a bounded distance ahead of whoever uses them."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ragkit.errors import ReadError, UsageError
from ragkit.readers.base import MB, ReadLimits
from ragkit.readers.origin import Source
from ragkit.readers.process import CHILD_COMMAND, ParserProcess
from ragkit.readers.reading import read_source
from ragkit.readers.result import ReadFailure, ReadResult

_AHEAD_BYTES = 64 * MB
_AHEAD_A_WORKER = 4


class ReaderPool:
    """Some parser processes that work while the results of others are used.

    Args:
        workers: parser processes; each starts when it is first needed.
        limits: what one source may cost.
        text_column: see `read_source`.
        ahead_bytes: results of files of about this size in all are read ahead; one file more is always read.
        command: how a parser process is started.
    """

    def __init__(
        self,
        workers: int = 1,
        limits: ReadLimits | None = None,
        *,
        text_column: str | None = None,
        ahead_bytes: int = _AHEAD_BYTES,
        command: Sequence[str] = CHILD_COMMAND,
    ) -> None:
        if workers < 1:
            raise UsageError(f"a reader pool needs at least one worker, got {workers}")
        self._limits = limits or ReadLimits()
        self._text_column = text_column
        self._ahead_bytes = ahead_bytes
        self._ahead = workers * _AHEAD_A_WORKER
        self._processes = [ParserProcess(command) for _ in range(workers)]
        self._idle: queue.SimpleQueue[ParserProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="ragkit-reader")

    def map(self, sources: Iterable[Source]) -> Iterator[ReadResult | ReadFailure]:
        """Yield the result or the failure of each source, in the order of `sources`.

        What is wrong with one source never stops the others. `sources` is drawn from as far ahead as is read.
        """
        waiting: deque[tuple[Source, Future[ReadResult | ReadFailure]]] = deque()
        ahead_bytes = 0
        coming = iter(sources)
        source = next(coming, None)
        try:
            while source is not None or waiting:
                while source is not None and (
                    not waiting or (len(waiting) < self._ahead and ahead_bytes + source.size <= self._ahead_bytes)
                ):
                    waiting.append((source, self._threads.submit(self._read, source)))
                    ahead_bytes += source.size
                    source = next(coming, None)
                done, future = waiting.popleft()
                result = future.result()
                ahead_bytes -= done.size
                del future
                yield result
                del result
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the parser processes at once; what is still being read is given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.close()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, source: Source) -> ReadResult | ReadFailure:
        process = self._idle.get()
        try:
            return read_source(source, self._limits, text_column=self._text_column, process=process)
        except ReadError as error:
            return ReadFailure(source, error)
        finally:
            self._idle.put(process)
