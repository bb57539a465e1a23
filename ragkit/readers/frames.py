"""The wire format between ragkit and a parser process: a length-prefixed JSON object, then raw bytes."""

from __future__ import annotations

import json
import os
import select
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_HEADER = struct.Struct(">4sIQ")
_MAGIC = b"RKF1"
MAX_JSON = 16 << 20
_READ_SIZE = 1 << 20


class FrameError(Exception):
    """The other side sent what is no frame."""


class FrameTimeoutError(Exception):
    """The other side stayed silent for too long."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message: a JSON object and the bytes that go with it."""

    fields: Mapping[str, Any]
    raw: bytes | bytearray = b""


def encode_frame(fields: Mapping[str, Any], raw: bytes = b"") -> tuple[bytes, bytes]:
    """Return the head and the bytes of one frame, to be written one after the other."""
    body = json.dumps(fields, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    return _HEADER.pack(_MAGIC, len(body), len(raw)) + body, raw


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class FrameReader:
    """Reads frames from a pipe without ever trusting a length before it was checked.

    Args:
        descriptor: the read end.
        max_raw: most raw bytes of one frame.
        remaining: seconds that the rest of the frame may take; None to wait for ever.
    """

    def __init__(self, descriptor: int, max_raw: int, remaining: Callable[[], float] | None = None) -> None:
        self.max_raw = max_raw
        self._descriptor = descriptor
        self._remaining = remaining
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def read(self) -> Frame | None:
        """Return the next frame, or None where the other side closed the pipe between two frames.

        Raises:
            FrameError: the bytes are no frame, a length is over its limit, or the pipe closed within a frame.
            FrameTimeoutError: the time is up.
        """
        if not self._fill(_HEADER.size):
            if self._buffer:
                raise FrameError("the pipe closed within a frame")
            return None
        magic, json_size, raw_size = _HEADER.unpack(self._take(_HEADER.size))
        if magic != _MAGIC or json_size > MAX_JSON or raw_size > self.max_raw:
            raise FrameError(f"not a frame: {magic!r}, lengths {json_size} and {raw_size}")
        if not self._fill(json_size):
            raise FrameError("the pipe closed within a frame")
        try:
            fields = json.loads(self._take(json_size))
        except (ValueError, RecursionError) as error:
            raise FrameError(f"not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise FrameError(f"not a JSON object: {type(fields).__name__}")
        return Frame(fields, self._raw(raw_size))

    def _raw(self, size: int) -> bytearray:
        """Return `size` bytes; what is not buffered yet is read straight into place."""
        if size <= len(self._buffer):
            return self._take(size)
        data, have = bytearray(size), len(self._buffer)
        data[:have] = self._take(have)
        view = memoryview(data)
        while have < size:
            self._wait()
            count = os.readv(self._descriptor, [view[have : have + _READ_SIZE]])
            if not count:
                raise FrameError("the pipe closed within a frame")
            have += count
        return data

    def _take(self, size: int) -> bytearray:
        taken = self._buffer[:size]
        del self._buffer[:size]
        return taken

    def _fill(self, size: int) -> bool:
        """Return whether `size` bytes are buffered; False where the pipe closed before."""
        while len(self._buffer) < size:
            self._wait()
            piece = os.read(self._descriptor, _READ_SIZE)
            if not piece:
                return False
            self._buffer += piece
        return True

    def _wait(self) -> None:
        if self._remaining is None:
            return
        seconds = self._remaining()
        if seconds <= 0 or not self._poll.poll(seconds * 1000):
            raise FrameTimeoutError
