"""The recursive chunker: whole paragraphs where they fit, else lines, sentences, words."""

from __future__ import annotations

from ragkit.chunking.base import Chunker
from ragkit.chunking.boundaries import Boundary
from ragkit.chunking.layout import layout_chunker
from ragkit.config import ChunkingConfig
from ragkit.types import TextTokenizer


def recursive_chunker(config: ChunkingConfig, tokenizer: TextTokenizer) -> Chunker:
    """Return a chunker that packs whole paragraphs; what is over the cap is cut at lines, sentences, then words.

    A paragraph, line or sentence that fits under the cap is never cut, unless a length prior wants it.
    """
    kinds = [Boundary.PARAGRAPH, Boundary.LINE, Boundary.SENTENCE, Boundary.WORD]
    return layout_chunker("recursive", kinds, config, tokenizer)
