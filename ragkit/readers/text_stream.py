"""Opens text files of any size as streams, and counts what could not be decoded."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ragkit.readers.base import Remark
from ragkit.readers.encodings import Encoding

_ERRORS = "ragkit-count"
# What makes Python read the mark itself, also after going back to the start.
_WITH_MARK = {
    "utf-8": "utf-8-sig",
    "utf-16-le": "utf-16",
    "utf-16-be": "utf-16",
    "utf-32-le": "utf-32",
    "utf-32-be": "utf-32",
}
_replaced = 0  # one process reads one file at a time


@dataclass(frozen=True, slots=True)
class TextStream:
    """An open file, its encoding, and the count of replacements before it was opened."""

    file: TextIO
    encoding: Encoding
    replaced_before: int

    def remarks(self) -> Iterator[Remark]:
        """Yield a remark where bytes had to be replaced so far."""
        count = _replaced - self.replaced_before
        if count:
            yield Remark(f"{count} byte sequences are not valid {self.encoding.name} and became U+FFFD")

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def open_text(path: Path, encoding: Encoding, newline: str) -> TextStream:
    """Return the file at `path` as decoded text without its mark; `newline` as `open` takes it."""
    name = _WITH_MARK[encoding.name] if encoding.mark else encoding.name
    return TextStream(path.open("r", encoding=name, errors=_ERRORS, newline=newline), encoding, _replaced)


def _count(error: UnicodeError) -> tuple[str, int]:
    global _replaced
    if not isinstance(error, UnicodeDecodeError):
        raise error
    _replaced += 1
    return "\ufffd", error.end


codecs.register_error(_ERRORS, _count)
