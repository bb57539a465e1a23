"""From an embedder to what embeds chunks: each on its own, or with the document around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ragkit.config import EmbeddingConfig
from ragkit.errors import UsageError
from ragkit.retrieval.base import ChunkEmbedder, Embedder, FloatMatrix, TokenEmbedder

if TYPE_CHECKING:
    from ragkit.store.base import DocumentSpans

# Between an embedder's identity and how it embeds chunks, where that is not one by one.
_MANNER = "+"


class SeparateChunks:
    """Embeds every chunk as a text of its own. Implements `ChunkEmbedder`."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    @property
    def embedder_id(self) -> str:
        """The embedder's own identity."""
        return self._embedder.embedder_id

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._embedder.dim

    def encode_chunks(
        self, documents: Sequence[DocumentSpans], on_tokens: Callable[[int], None] | None = None
    ) -> FloatMatrix:
        """Return the vectors of all chunks, embedded in one call: long batches pad less."""
        texts = [document.text[start:stop] for document in documents for start, stop in document.spans]
        return self._embedder.encode(texts, on_tokens=on_tokens)


def chunk_embedder(embedder: Embedder, config: EmbeddingConfig) -> ChunkEmbedder:
    """Return what embeds chunks with `embedder` as `config` says.

    Raises:
        UsageError: late chunking was asked for, and the embedder gives no token states or does not average them.
    """
    if not config.late_chunking:
        return SeparateChunks(embedder)
    if not isinstance(embedder, TokenEmbedder) or not embedder.averages_tokens:
        raise UsageError(
            f"late chunking averages token vectors, and the embedder {embedder.embedder_id} does not make its own "
            "vectors so; take an embedder with mean pooling, or turn embedding.late_chunking off"
        )
    from ragkit.retrieval.late_chunking import LateChunks

    # A window holds as many tokens as one forward may, so that a model with a huge window stays within its memory.
    window = min(embedder.max_tokens, config.batch_tokens)
    return LateChunks(embedder, window, config.window_overlap, _MANNER)


def question_embedder_id(embedder_id: str) -> str:
    """Return the identity of the embedder for questions about chunks that `embedder_id` embedded."""
    return embedder_id.partition(_MANNER)[0]
