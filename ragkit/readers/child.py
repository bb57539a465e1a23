"""The parser process: reads requests, parses one file each, and answers in frames.

Started by `ragkit.readers.process` with its own limits on memory, processor time, wall clock and files. It imports a
parser library when the first file of that kind comes, and nothing else of ragkit but the readers.
"""

from __future__ import annotations

import math
import os
import resource
import signal
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ragkit.errors import ReadError
from ragkit.readers.base import MB, FailedRow, ParseContext, ParsedDocument, Reader, ReadLimits, Remark
from ragkit.readers.encodings import clean
from ragkit.readers.frames import FrameReader, encode_frame, write_all
from ragkit.readers.media_type import MediaType
from ragkit.readers.registry import load_reader

_FLUSH_BYTES = 256 * 1024
_GRACE_S = 5.0  # the parent kills at the limit; this is for a parent that is gone
_MAX_MESSAGE = 500


def main() -> None:
    """Serve requests on standard input with the built-in readers until it closes."""
    requests, replies = private_pipes()
    serve(requests, replies, load_reader)


def private_pipes() -> tuple[int, int]:
    """Return the two ends moved off descriptors 0 and 1, so that nothing a library prints gets into a frame."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return requests, replies


def serve(requests: int, replies: int, readers: Callable[[MediaType], Reader]) -> None:
    """Answer every request with documents and a closing frame, until the requests end."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write becomes an error instead of a death
    outbox = _Outbox(replies)
    outbox.send({"kind": "ready", "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})
    outbox.flush()
    incoming = FrameReader(requests, max_raw=0)
    while (request := incoming.read()) is not None:
        closing = _answer(request.fields, readers, outbox)
        signal.setitimer(signal.ITIMER_REAL, 0)
        outbox.send({**closing, "resident_mb": _peak_resident_mb()})
        outbox.flush()


class _Outbox:
    """Buffers frames, and restarts the clock when documents leave."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = bytearray()
        self.timeout_s = math.inf

    def send(self, message: Mapping[str, Any], raw: bytes = b"") -> None:
        head, raw = encode_frame(message, raw)
        self._buffer += head
        if len(raw) >= _FLUSH_BYTES:
            self.flush()
            write_all(self._descriptor, raw)
        else:
            self._buffer += raw
        if len(self._buffer) >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        write_all(self._descriptor, data)
        if math.isfinite(self.timeout_s):
            _wind_clocks(self.timeout_s)


def _answer(request: Mapping[str, Any], readers: Callable[[MediaType], Reader], outbox: _Outbox) -> dict[str, Any]:
    """Send the documents of one request and return its closing message."""
    limits = ReadLimits(**{field.name: request["limits"][field.name] for field in fields(ReadLimits)})
    context = ParseContext(limits, request["text_column"])
    outbox.timeout_s = limits.timeout_s
    _wind_clocks(limits.timeout_s)
    _limit_memory(limits.memory_mb)
    try:
        _send_documents(readers(MediaType(request["media_type"])), Path(request["path"]), context, outbox)
    except ReadError as error:
        return _failure(error.code, str(error), error.stage)
    except MemoryError:
        return _failure("oom", f"needed more than {limits.memory_mb} MB")
    except ImportError as error:
        short = "segment" in str(error) or "memory" in str(error)
        return _failure("oom" if short else "unsupported", f"the parser could not be loaded: {error}")
    except RecursionError:
        return _failure("corrupt", "nested too deeply")
    except UnicodeError as error:
        return _failure("encoding", str(error))
    except OSError as error:
        return _failure("unreadable", str(error.strerror or error), "read")
    except Exception as error:
        return _failure("corrupt", f"{type(error).__name__}: {error}")
    finally:
        outbox.timeout_s = math.inf
    return {"kind": "done"}


def _send_documents(reader: Reader, path: Path, context: ParseContext, outbox: _Outbox) -> None:
    for item in reader.read(path, context):
        if isinstance(item, FailedRow):
            outbox.send(
                {"kind": "failed_row", "row": item.row, "code": item.code, "message": item.message[:_MAX_MESSAGE]}
            )
            continue
        if isinstance(item, Remark):
            outbox.send({"kind": "remark", "message": item.message[:_MAX_MESSAGE]})
            continue
        raw = item.text.encode("utf-8")
        if len(raw) > context.limits.max_text_bytes:
            raise ReadError(
                f"{len(raw)} bytes of text are over the limit of {context.limits.max_text_bytes}", code="too_large"
            )
        outbox.send(_described(item), raw)


def _described(item: ParsedDocument) -> dict[str, Any]:
    return {
        "kind": "document",
        "row": item.row,
        "pages": [(page.number, page.char_start, page.char_stop) for page in item.pages],
        "metadata": {
            clean(key)[0]: clean(value)[0] if isinstance(value, str) else value for key, value in item.metadata.items()
        },
        "warnings": item.warnings,
    }


def _failure(code: str, message: str, stage: str = "parse") -> dict[str, Any]:
    return {"kind": "error", "code": code, "stage": stage, "message": message[:_MAX_MESSAGE]}


def _wind_clocks(timeout_s: float) -> None:
    """Let the kernel end this process if it outlives its document, whether it computes or sleeps."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + timeout_s + _GRACE_S)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds if hard == resource.RLIM_INFINITY else min(seconds, hard), hard))
    signal.setitimer(signal.ITIMER_REAL, timeout_s + _GRACE_S)


def _peak_resident_mb() -> int:
    """Return the most memory that this program held; getrusage would count what the parent held when it forked."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return 0


def _limit_memory(memory_mb: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = memory_mb * MB
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
