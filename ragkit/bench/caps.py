"""What the caps of a chunking evaluation are counted in, and which ones are tried where nobody says."""

from __future__ import annotations

from enum import StrEnum


class CapUnit(StrEnum):
    """The generator's tokens, or characters."""

    TOKENS = "tokens"
    CHARACTERS = "characters"


DEFAULT_CAPS = {CapUnit.TOKENS: (64, 128, 256), CapUnit.CHARACTERS: (200, 400, 800)}
