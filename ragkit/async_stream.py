"""The pieces of one answer for asyncio: a thread generates, a bounded queue hands them to the event loop.

A consumer that is slower than the model holds the thread back once the queue is full. Whoever cancels the task that
waits for a piece, leaves the `async with` block or drops the stream ends the generation after the token at hand, and
the thread then gives the request's KV back.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from ragkit.errors import GenerationError, UsageError

if TYPE_CHECKING:
    from ragkit.request import AnswerStream
    from ragkit.types import Answer

PIECES_AHEAD = 32


class AsyncAnswerStream:
    """An asynchronous iterator over the pieces of an answer; afterwards `await stream.answer()` is all of it.

    Use it with `async with`, so that it ends with the block. It belongs to the event loop that reads it first, and to
    one task at a time.

    Args:
        start: makes the stream; called in the thread, which also reads and closes it.
        ahead: pieces that are generated before they are asked for.

    Raises:
        UsageError: `ahead` is below 1.
    """

    def __init__(self, start: Callable[[], AnswerStream], ahead: int = PIECES_AHEAD) -> None:
        if ahead < 1:
            raise UsageError(f"a stream hands over at least 1 piece at a time, got ahead={ahead}")
        self._start = start
        self._ahead = ahead
        self._handover: _Handover | None = None
        self._closed = False

    def __aiter__(self) -> AsyncAnswerStream:
        return self

    async def __anext__(self) -> str:
        if self._handover is None:
            if self._closed:
                raise StopAsyncIteration
            self._handover = self._begin()
        try:
            return await self._handover.get()
        except asyncio.CancelledError:
            self._handover.stop()
            raise

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def answer(self) -> Answer:
        """Return the whole answer; what has not been read yet is generated first.

        Raises:
            GenerationError: the stream was closed before its end.
        """
        async for _ in self:
            pass
        answer = None if self._handover is None else self._handover.answer
        if answer is None:
            raise GenerationError("the stream was closed before its end, so there is no whole answer: ask again")
        return answer

    async def aclose(self) -> None:
        """Stop generating; when this returns, the request's memory is free. A step that runs is waited for."""
        self._closed = True
        if self._handover is not None:
            self._handover.stop()
            await self._handover.finished()

    def _begin(self) -> _Handover:
        handover = _Handover(asyncio.get_running_loop(), self._ahead)
        weakref.finalize(self, handover.stop)  # the thread knows nothing of this object, so that it can be dropped
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=context.run, args=(_produce, self._start, handover), name="ragkit-stream", daemon=True
        )
        thread.start()
        return handover


class _Handover:
    """The bounded queue between a thread that puts pieces and a loop that gets them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, size: int) -> None:
        self.answer: Answer | None = None
        self._loop = loop
        self._pieces: deque[str] = deque()
        self._room = threading.Semaphore(size)
        self._stopped = threading.Event()
        self._error: Exception | None = None
        self._ended = False
        self._changed = asyncio.Event()

    @property
    def stopped(self) -> bool:
        """Whether nobody wants any more pieces."""
        return self._stopped.is_set()

    def put(self, piece: str) -> bool:
        """Hand a piece over once there is room; return whether more are wanted. For the thread."""
        self._room.acquire()
        if self.stopped:
            return False
        self._pieces.append(piece)
        self._tell()
        return True

    def end(self, answer: Answer | None, error: Exception | None) -> None:
        """Say that no more pieces come, and why. For the thread, as its last act."""
        self.answer, self._error, self._ended = answer, error, True
        self._tell()

    def stop(self) -> None:
        """Say that no more pieces are wanted. For any thread."""
        self._stopped.set()
        self._room.release()  # the thread may be waiting for it

    async def get(self) -> str:
        """Return the next piece. For the loop.

        Raises:
            StopAsyncIteration: there is none.
        """
        while True:
            if self.stopped:
                raise StopAsyncIteration
            if self._pieces:
                self._room.release()
                return self._pieces.popleft()
            if self._ended:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopAsyncIteration
            await self._news(lambda: bool(self._pieces) or self._ended)

    async def finished(self) -> None:
        """Return once the thread has let go of everything."""
        while not self._ended:
            await self._news(lambda: self._ended)

    async def _news(self, is_there: Callable[[], bool]) -> None:
        self._changed.clear()
        if not is_there():  # what came before the event was cleared would not set it again
            await self._changed.wait()

    def _tell(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._stopped.set()


def _produce(start: Callable[[], AnswerStream], handover: _Handover) -> None:
    """Generate in this thread until the answer is whole or nobody wants it."""
    answer: Answer | None = None
    failure: Exception | None = None
    try:
        if handover.stopped:
            return
        stream = start()
        try:
            if all(handover.put(piece) for piece in stream):
                answer = stream.answer
        finally:
            stream.close()
    except Exception as error:
        failure = error
    finally:
        handover.end(answer, failure)
