"""Where text may be cut without breaking what a reader sees as one character (Unicode UAX #29)."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _pattern(at_most: int) -> Any:
    import regex  # slow to import, and plain ASCII text never needs it

    # A surrogate pair that was decoded as two code points is one character too.
    return regex.compile(rf"(?:[\ud800-\udbff][\udc00-\udfff]|\X){{1,{at_most}}}")


def grapheme_runs(text: str, at_most: int) -> list[str]:
    """Return `text` as consecutive runs of 1 to `at_most` grapheme clusters; joined they are `text`."""
    if text.isascii() and "\r\n" not in text:
        return [text[start : start + at_most] for start in range(0, len(text), at_most)]
    return list(_pattern(at_most).findall(text))
