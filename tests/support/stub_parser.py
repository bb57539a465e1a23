"""A parser process whose reader does what the file tells it to: a stand-in for parsers that fail in every way.

Started as a command by tests. The file holds `<html>` and one word; `BEHAVIOURS` says what the word does.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ragkit.errors import ReadError
from ragkit.readers.base import ParseContext, Parsed, ParsedDocument
from ragkit.readers.child import private_pipes, serve
from ragkit.readers.media_type import MediaType
from ragkit.types import PageSpan

REQUESTS, REPLIES = private_pipes()


def _eat() -> None:
    held = []
    while True:
        held.append(bytearray(8 << 20))


def _eat_native() -> None:
    try:
        _eat()
    except MemoryError:
        os.abort()  # what PDFium does when an allocation fails


def _garbage() -> None:
    os.write(REPLIES, b"Segmentation fault? No, just noise on the wire.")


def _half_frame() -> None:
    os.write(REPLIES, b"RKF1\0\0")
    os._exit(0)


def _huge_frame() -> None:
    os.write(REPLIES, b"RKF1" + (2).to_bytes(4, "big") + (1 << 60).to_bytes(8, "big") + b"{}")


def _deaf() -> None:
    os.close(REPLIES)
    time.sleep(1000)


def _recurse() -> None:
    _recurse()


def _refuse() -> None:
    raise ReadError("the stub wants a password", code="encrypted")


def _stumble() -> None:
    raise KeyError("startxref")


BEHAVIOURS: dict[str, Callable[[], object]] = {
    "spin": lambda: collections.deque(itertools.repeat(0), maxlen=0),  # a loop in C: no signal handler ever runs
    "sleep": lambda: time.sleep(1000),
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exit": lambda: os._exit(7),
    "eat": _eat,
    "eat_native": _eat_native,
    "garbage": _garbage,
    "half_frame": _half_frame,
    "huge_frame": _huge_frame,
    "deaf": _deaf,
    "recurse": _recurse,
    "refuse": _refuse,
    "stumble": _stumble,
    "print": lambda: print("noise on standard output", flush=True),
}


class StubReader:
    """Reads one word and does it, then yields a document that names the process."""

    name = "html"
    version = 1
    media_types = frozenset((MediaType.HTML,))

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        word = path.read_text().removeprefix("<html>").strip()
        if word == "bad_pages":
            yield ParsedDocument("short", (PageSpan(1, 0, 500),))
        elif word == "bad_metadata":
            yield ParsedDocument("text", metadata={"nested": {"no": "no"}})  # type: ignore[dict-item]
        elif word == "slow_rows":
            for row in range(1, 5):
                time.sleep(0.4)
                yield ParsedDocument("x" * 300_000, row=row)
        elif word == "environment":
            yield ParsedDocument(" ".join(sorted(os.environ)))
        elif word == "modules":
            yield ParsedDocument(" ".join(sorted(sys.modules)))
        elif word == "write":
            path.with_suffix(".written").write_text("x")
        else:
            if word in BEHAVIOURS:
                BEHAVIOURS[word]()
            yield ParsedDocument(f"{word} in process {os.getpid()}")


if __name__ == "__main__":
    serve(REQUESTS, REPLIES, lambda media_type: StubReader())
