"""The sentence chunker: as many whole sentences as the cap holds."""

from __future__ import annotations

from ragkit.chunking.base import Chunker
from ragkit.chunking.boundaries import Boundary
from ragkit.chunking.layout import layout_chunker
from ragkit.config import ChunkingConfig
from ragkit.types import TextTokenizer


def sentence_chunker(config: ChunkingConfig, tokenizer: TextTokenizer) -> Chunker:
    """Return a chunker that packs whole sentences; only a sentence over the cap is cut, between words."""
    return layout_chunker("sentence", [Boundary.SENTENCE, Boundary.WORD], config, tokenizer)
