"""The chunker contract: every chunker cuts a document into chunks that tile its text, under a hard token cap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ragkit.errors import ChunkingError
from ragkit.types import Chunk, Document


class Chunker(Protocol):
    """Cuts documents into chunks.

    Contract (`check_chunks`): spans ascend and cover the text without gaps, every `text` is exactly its span, no
    chunk has more than `max_tokens` tokens, and equal documents give equal chunks. Text of no characters gives
    no chunks.
    """

    @property
    def name(self) -> str:
        """The name that `--chunker` takes."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the cuts, the tokenizer included."""
        ...

    def chunk(self, document: Document) -> list[Chunk]:
        """Return the chunks of `document`, in order.

        Raises:
            ChunkingError: the text cannot be cut under the cap.
        """
        ...


@runtime_checkable
class PackingChunker(Chunker, Protocol):
    """A chunker that cuts several documents sooner together than one by one: its model's batches are fuller."""

    def chunk_many(self, documents: Sequence[Document]) -> list[list[Chunk]]:
        """Return the chunks of each document, the same as `chunk` one by one.

        Raises:
            ChunkingError: the text of one of them cannot be cut under the cap.
        """
        ...


def chunk_documents(chunker: Chunker, documents: Sequence[Document]) -> list[list[Chunk]]:
    """Return the chunks of each document, cut together where the chunker can do that.

    Raises:
        ChunkingError: the text of one of them cannot be cut under the cap.
    """
    if isinstance(chunker, PackingChunker):
        return chunker.chunk_many(documents)
    return [chunker.chunk(document) for document in documents]


def check_chunks(document: Document, chunks: Sequence[Chunk], max_tokens: int) -> None:
    """Raise `ChunkingError` naming the first broken invariant of the `Chunker` contract."""
    covered = 0
    for index, chunk in enumerate(chunks):
        span = (chunk.char_start, chunk.char_stop)
        if chunk.index != index:
            raise ChunkingError(f"{document.uri}: chunk {index} says it has index {chunk.index}")
        if not chunk.char_start <= covered < chunk.char_stop:
            raise ChunkingError(f"{document.uri}: chunk {index} spans {span}, expected one that goes on at {covered}")
        if chunk.text != document.text[chunk.char_start : chunk.char_stop]:
            raise ChunkingError(f"{document.uri}: chunk {index} does not hold the text of its span {span}")
        if chunk.token_count > max_tokens:
            raise ChunkingError(
                f"{document.uri}: chunk {index} has {chunk.token_count} tokens, the cap is {max_tokens}"
            )
        covered = chunk.char_stop
    if covered != len(document.text):
        raise ChunkingError(f"{document.uri}: the chunks end at {covered}, the text at {len(document.text)}")
