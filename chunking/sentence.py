"""The sentence chunker: as many whole sentences as the cap holds."""

from __future__ import annotations

from ragkit.chunking.boundaries import Boundary
from ragkit.chunking.packed import PackedChunker
from ragkit.config import ChunkingConfig
from ragkit.types import TextTokenizer


def sentence_chunker(config: ChunkingConfig, tokenizer: TextTokenizer) -> PackedChunker:
    """Return a chunker that packs whole sentences; only a sentence over the cap is cut, between words."""
    kinds = [Boundary.SENTENCE, Boundary.WORD]
    return PackedChunker("sentence", kinds, tokenizer, config.max_tokens, config.overlap_tokens)
