"""The parent's side of a parser process: starts it, talks to it, and kills it when a document is too much for it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragkit.errors import ReadError
from ragkit.readers.base import FailedRow, ParseContext, Parsed, ParsedDocument, Remark
from ragkit.readers.frames import Frame, FrameError, FrameReader, FrameTimeoutError, encode_frame, write_all
from ragkit.readers.media_type import MediaType
from ragkit.types import PageSpan

# -P keeps the current folder off the module path: in a checkout it holds folders named like our packages.
CHILD_COMMAND = (sys.executable, "-P", "-c", "from ragkit.readers.child import main; main()")
_START_S = 60.0
_MAX_DOCUMENTS = 5000
_MAX_PEAK_MB = 768
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")
_CODES = frozenset(
    ("unsupported", "empty", "needs_ocr", "encrypted", "corrupt", "encoding", "too_large", "oom", "unreadable")
)


class ParserProcess:
    """Parses one file at a time in a child that is used again for the next one and replaced when it fails.

    A child also ends after 5,000 documents or once it has grown large. `close` may be called from any thread.
    """

    def __init__(self, command: Sequence[str] = CHILD_COMMAND) -> None:
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._idle: _Child | None = None
        self._working: _Child | None = None
        self._closed = False

    def parse(self, path: Path, media_type: MediaType, context: ParseContext) -> Generator[Parsed]:
        """Yield the documents of `path`. A caller that stops before the end closes the iterator.

        Raises:
            ReadError: what the reader found wrong, or `timeout`, `oom` or `crash` of the child. The child is then
                gone, and the next call starts another.
        """
        child = self._take()
        finished = False
        try:
            yield from child.parse(path, media_type, context)
            finished = True
        except ReadError as error:
            finished = error.code not in ("timeout", "oom", "crash")
            raise
        finally:
            self._give_back(child, sound=finished and not child.worn_out)

    def close(self) -> None:
        """End the child for good. One that is at work is killed, and whoever waits for it gets a `crash`."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, None
            working = self._working
        if idle is not None:
            idle.end()
        if working is not None:
            working.interrupt()

    def __enter__(self) -> ParserProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> _Child:
        """Return a child that is ready. It belongs to the caller until it is given back."""
        with self._lock:
            child, self._idle = self._idle, None
        if child is None or child.owner != os.getpid() or not child.alive:  # a fork leaves a copy of another's child
            child = _Child(self._command)
        with self._lock:
            self._working = child
            closed = self._closed
        if closed:
            child.end()
            raise ReadError("reading was given up", code="crash", stage="read")
        return child

    def _give_back(self, child: _Child, *, sound: bool) -> None:
        with self._lock:
            if self._working is child:
                self._working = None
            if sound and not self._closed and self._idle is None:
                self._idle = child
                return
        child.end()


class _Child:
    """One running child."""

    def __init__(self, command: Sequence[str]) -> None:
        self.owner = os.getpid()
        self._documents = 0
        self._peak_mb = 0
        self._deadline = time.monotonic() + _START_S
        try:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if os.environ.get("RAGKIT_DEBUG") == "1" else subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # Ctrl-C goes to the parent alone, which then ends the child
            )
        except OSError as error:
            raise ReadError(f"the parser process could not start: {error}", code="crash", stage="read") from error
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._requests = self._popen.stdin.fileno()
        self._frames = FrameReader(
            self._popen.stdout.fileno(), max_raw=0, remaining=lambda: self._deadline - time.monotonic()
        )
        self._finalizer = weakref.finalize(self, _end, self._popen, self.owner)
        ready = self._receive(None).fields
        if ready.get("kind") != "ready":
            raise self._garbage("a first message that is not `ready`")
        # Linux counts the peak of the process that forked as the child's own; only what exceeds it tells something.
        self._inherited_mb = _whole(ready.get("peak_mb"))

    @property
    def alive(self) -> bool:
        return self._finalizer.alive and self._popen.poll() is None

    @property
    def worn_out(self) -> bool:
        return self._documents >= _MAX_DOCUMENTS or self._peak_mb >= _MAX_PEAK_MB

    def end(self) -> None:
        """Kill the process and close its pipes; for the thread that talks to it."""
        self._finalizer()

    def interrupt(self) -> None:
        """Kill the process and leave its pipes alone, which another thread is reading."""
        self._popen.kill()

    def parse(self, path: Path, media_type: MediaType, context: ParseContext) -> Iterator[Parsed]:
        limits = context.limits
        request = {
            "path": str(path),
            "media_type": media_type.value,
            "limits": asdict(limits),
            "text_column": context.text_column,
        }
        self._documents += 1
        self._deadline = time.monotonic() + limits.timeout_s
        self._frames.max_raw = limits.max_text_bytes
        try:
            write_all(self._requests, b"".join(encode_frame(request)))
        except OSError as error:
            raise self._died(context) from error
        while True:
            frame = self._receive(context)
            kind = frame.fields.get("kind")
            if kind == "document":
                yield self._document(frame)
            elif kind == "failed_row":
                yield self._failed_row(frame.fields)
            elif kind == "remark":
                yield Remark(_line(frame.fields.get("message")))
            elif kind == "done":
                self._note_peak(frame.fields)
                return
            elif kind == "error":
                self._note_peak(frame.fields)
                raise self._reported(frame.fields)
            else:
                raise self._garbage(f"a message of kind {kind!r}")
            self._deadline = time.monotonic() + limits.timeout_s

    def _receive(self, context: ParseContext | None) -> Frame:
        """Return the next frame; `context` is None while the child starts."""
        try:
            frame = self._frames.read()
        except FrameTimeoutError as error:
            if context is None:
                raise ReadError(f"the parser process did not start within {_START_S:g} s", code="crash") from error
            raise ReadError(f"not parsed within {context.limits.timeout_s:g} s", code="timeout") from error
        except FrameError as error:
            if "closed" in str(error):
                raise self._died(context) from error
            raise self._garbage(str(error)) from error
        if frame is None:
            raise self._died(context)
        return frame

    def _died(self, context: ParseContext | None) -> ReadError:
        """Return the error for a child that has ended, told from how it ended and how large it had grown."""
        code, peak_mb = _reap(self._popen)
        if code is None:
            return self._garbage("an end of messages, and went on")
        if context is None:
            return ReadError(
                f"the parser process ended with status {code} before it started; is ragkit installed?", code="crash"
            )
        if -code in (signal.SIGXCPU, signal.SIGALRM):
            return ReadError(f"not parsed within {context.limits.timeout_s:g} s", code="timeout")
        large = peak_mb > max(self._inherited_mb, 0.6 * context.limits.memory_mb)
        if code == -signal.SIGKILL or (code < 0 and large):
            return ReadError(f"needed more than {context.limits.memory_mb} MB", code="oom")
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return ReadError(f"the parser crashed with {how}", code="crash")

    def _garbage(self, what: str) -> ReadError:
        return ReadError(f"the parser process sent {what[:200]}", code="crash")

    def _document(self, frame: Frame) -> ParsedDocument:
        """Return the document of a frame. A parser may have been taken over by its input: every field is checked."""
        try:
            text = str(frame.raw, "utf-8")
            fields = frame.fields
            if "\0" in text:
                raise ValueError("NUL in the text")
            return ParsedDocument(
                text,
                _pages(fields["pages"], len(text)),
                _metadata(fields["metadata"]),
                None if fields["row"] is None else _whole(fields["row"]),
                tuple(_line(warning) for warning in fields["warnings"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._garbage(f"a broken document: {error}") from error

    def _failed_row(self, fields: Mapping[str, Any]) -> FailedRow:
        try:
            return FailedRow(_whole(fields["row"]), _code(fields), _line(fields["message"]))
        except (KeyError, TypeError, ValueError) as error:
            raise self._garbage(f"a broken row: {error}") from error

    def _reported(self, fields: Mapping[str, Any]) -> ReadError:
        try:
            stage = "read" if fields["stage"] == "read" else "parse"
            return ReadError(_line(fields["message"]), code=_code(fields), stage=stage)
        except (KeyError, TypeError, ValueError) as error:
            return self._garbage(f"a broken error: {error}")

    def _note_peak(self, fields: Mapping[str, Any]) -> None:
        peak = fields.get("resident_mb")
        self._peak_mb = peak if isinstance(peak, int) else _MAX_PEAK_MB


def _reap(popen: subprocess.Popen[bytes]) -> tuple[int | None, int]:
    """Return the exit status and the peak memory in MB of a child that closed its pipe; None if it does not end."""
    for pause in (0.0, 0.001, 0.01, 0.1, 0.5, 1.0):
        time.sleep(pause)
        try:
            pid, status, usage = os.wait4(popen.pid, os.WNOHANG)
        except ChildProcessError:  # reaped by the thread that interrupted it
            return popen.wait(), 0
        if pid:
            popen.returncode = os.waitstatus_to_exitcode(status)
            return popen.returncode, usage.ru_maxrss // 1024
    return None, 0


def _end(popen: subprocess.Popen[bytes], owner: int) -> None:
    """Kill a child with everything it started, and reap it; a forked copy of the parent leaves it alone."""
    if owner != os.getpid():
        return
    if popen.poll() is None:
        try:
            os.killpg(popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            popen.kill()
        popen.wait()
    for pipe in (popen.stdin, popen.stdout):
        if pipe is not None:
            pipe.close()


def _environment() -> dict[str, str]:
    """Return what a parser needs of the environment; keys and tokens stay out of its reach."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_ENVIRONMENT or name.startswith(("PYTHON", "LC_", "COV_", "RAGKIT_DEBUG"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


def _pages(pages: Any, length: int) -> tuple[PageSpan, ...]:
    spans, covered, last = [], 0, 0
    for number, start, stop in pages:
        if not (last < _whole(number) and covered <= _whole(start) <= _whole(stop) <= length):
            raise ValueError(f"page {number} spans {start} to {stop}")
        spans.append(PageSpan(number, start, stop))
        covered, last = stop, number
    return tuple(spans)


def _metadata(metadata: Any) -> dict[str, str | int | float | bool | None]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float | bool | None):
            raise ValueError(f"metadata {key!r} is a {type(value).__name__}")
        f"{key}{value}".encode()  # no lone surrogates
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"metadata {key!r} is {value}")
    return dict(metadata)


def _line(message: Any) -> str:
    """Return a message of a child as one line of valid text."""
    return " ".join(str(message).encode("utf-8", "replace").decode("utf-8").split())


def _code(fields: Mapping[str, Any]) -> str:
    code = fields["code"]
    if code not in _CODES:
        raise ValueError(f"unknown code {code!r}")
    return str(code)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
