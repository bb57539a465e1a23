"""Who finds the sentences that chunkers cut at: the rules, or a model that the settings name."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

from ragkit.chunking.sentences import sentence_starts
from ragkit.config import ChunkingConfig


class SentenceSegmenter(Protocol):
    """Finds sentences."""

    @property
    def fingerprint(self) -> str:
        """Changes with everything that changes the boundaries; empty for the rules."""
        ...

    @property
    def context(self) -> int:
        """Code points behind a place that tell whether a sentence starts there."""
        ...

    def starts(self, text: str) -> list[int]:
        """Return the offset of the first code point of each sentence of `text`, ascending; the first is 0."""
        ...


class RuleSegmenter:
    """Finds sentences by the rules of `ragkit.chunking.sentences`."""

    fingerprint = ""
    context = 64  # what may open a sentence, and the word behind it

    def starts(self, text: str) -> list[int]:
        """Return where sentences start."""
        return sentence_starts(text)


def configured_segmenter(config: ChunkingConfig) -> SentenceSegmenter:
    """Return who finds sentences as `config` says; a model is loaded once.

    Raises:
        ModelError: the model's folder is incomplete or damaged.
        MissingExtraError: the package that runs it is not installed.
    """
    if not config.sentence_model:
        return RuleSegmenter()
    return _sat(config.sentence_model, config.sentence_threshold)


@lru_cache(maxsize=1)
def _sat(folder: str, threshold: float) -> SentenceSegmenter:
    from ragkit.chunking.sat_sentences import SatSegmenter

    return SatSegmenter(Path(folder).expanduser(), threshold)
