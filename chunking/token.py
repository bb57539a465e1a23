"""The token chunker: chunks filled to the cap, cut between words wherever that is."""

from __future__ import annotations

from ragkit.chunking.base import Chunker
from ragkit.chunking.boundaries import Boundary
from ragkit.chunking.layout import layout_chunker
from ragkit.config import ChunkingConfig
from ragkit.types import TextTokenizer


def token_chunker(config: ChunkingConfig, tokenizer: TextTokenizer) -> Chunker:
    """Return a chunker that fills every chunk to the cap; words stay whole where the cap allows."""
    return layout_chunker("token", [Boundary.WORD], config, tokenizer)
