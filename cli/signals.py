"""SIGINT and SIGTERM: stop at once, or, where a command asks for it, after the running commit.

Exit codes are the shell's: 130 for SIGINT, 143 for SIGTERM.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked the command to stop. Not an `Exception`, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class StopRequest:
    """Whether a signal has asked for a stop (`event`, for the work to look at), and the exit code that goes with it."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.exit_code = 0


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` in the main thread when a signal arrives; in other threads do nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handling(stop):
        yield


@contextmanager
def finishing_first(on_request: Callable[[], None]) -> Iterator[StopRequest]:
    """Note the first signal and call `on_request`; the second one raises `Interrupted`."""
    request = StopRequest()

    def stop(number: int, frame: FrameType | None) -> None:
        if request.event.is_set():
            raise Interrupted(number)
        request.exit_code = 128 + number
        request.event.set()
        on_request()

    with _handling(stop):
        yield request


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
