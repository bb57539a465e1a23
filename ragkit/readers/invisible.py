"""Characters that a reader does not see and a language model does: where hidden instructions like to stand."""

from __future__ import annotations

import re

# Tag characters spell invisible ASCII; after a black flag they are a regional flag and mean no harm.
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f")
_TAGS = re.compile("[\U000e0000-\U000e007f]+")
_BIDI_OVERRIDE = re.compile("[\u202d\u202e]")
# Joiners (U+200C, U+200D) are left alone: emoji, Persian and Indic scripts need them.
_ZERO_WIDTH = re.compile("[\u200b\u2060-\u2064\ufeff\u00ad]")
_VISIBLE = re.compile("[^\\s\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\u00ad\U000e0000-\U000e007f]")
_MANY_ZERO_WIDTH = 20


def invisible_warnings(text: str) -> tuple[str, ...]:
    """Return a warning for each kind of suspicious invisible character in a text that is kept unchanged."""
    if text.isascii():
        return ()
    warnings = []
    tags = sum(len(run) for run in _TAGS.findall(_FLAG.sub("", text))) if _TAGS.search(text) else 0
    if tags:
        warnings.append(f"{tags} invisible tag characters (U+E0000 to U+E007F) may hide text from human readers")
    overrides = sum(1 for _ in _BIDI_OVERRIDE.finditer(text))
    if overrides:
        warnings.append(f"{overrides} characters override the writing direction and may disguise text")
    zero_width = sum(1 for _ in _ZERO_WIDTH.finditer(text))
    if zero_width >= _MANY_ZERO_WIDTH:
        warnings.append(f"{zero_width} zero-width characters stand in the text")
    return tuple(warnings)


def strip_invisible(text: str) -> str:
    """Return `text` without zero-width and tag characters, flags kept; for formats whose text is ours to build."""
    if text.isascii():
        return text
    if _TAGS.search(text):
        text = "".join(
            piece if _FLAG.fullmatch(piece) else _TAGS.sub("", piece) for piece in re.split(f"({_FLAG.pattern})", text)
        )
    return _ZERO_WIDTH.sub("", text)


def is_blank(text: str) -> bool:
    """Return whether nothing in `text` can be seen."""
    return _VISIBLE.search(text) is None
