"""The chunkers of other packages that ragkit's are timed against, on the same tokenizer and embedder.

Each function returns what chunks a text, made anew so that nothing is remembered from an earlier round; it raises
ImportError where the package is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.sentence_vectors import SentenceEmbedder

Chunked = list[str]
Vectors = NDArray[np.float32]


class CountingEmbedder:
    """A `SentenceEmbedder` that counts what it embeds."""

    def __init__(self, embedder: SentenceEmbedder) -> None:
        self._embedder = embedder
        self.texts = self.characters = 0

    @property
    def embedder_id(self) -> str:
        """The embedder's."""
        return self._embedder.embedder_id

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return the embedder's vectors."""
        self.texts += len(texts)
        self.characters += sum(map(len, texts))
        return self._embedder.encode(texts)


def releases() -> dict[str, str]:
    """Return the release of each package of peers that is installed."""
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    return {name: installed[name] for name in ("chonkie", "chonkie-core", "llama-index-core") if name in installed}


def plain_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in `folder` as the `tokenizers` library reads it, without limits: what peers take."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def chonkie_recursive(tokenizer: Any, cap: int) -> Callable[[str], Chunked]:
    """Return chonkie's RecursiveChunker with its default rules."""
    from chonkie import RecursiveChunker

    return lambda text: [chunk.text for chunk in RecursiveChunker(tokenizer=tokenizer, chunk_size=cap).chunk(text)]


def chonkie_sentence(tokenizer: Any, cap: int) -> Callable[[str], Chunked]:
    """Return chonkie's SentenceChunker without overlap."""
    from chonkie import SentenceChunker

    return lambda text: [
        chunk.text for chunk in SentenceChunker(tokenizer=tokenizer, chunk_size=cap, chunk_overlap=0).chunk(text)
    ]


def llama_index_sentence(tokenizer: Any, cap: int) -> Callable[[str], Chunked]:
    """Return LlamaIndex's SentenceSplitter without overlap."""
    from llama_index.core.node_parser import SentenceSplitter

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def split(text: str) -> Chunked:
        return list(SentenceSplitter(chunk_size=cap, chunk_overlap=0, tokenizer=encode).split_text(text))

    return split


def chonkie_semantic(tokenizer: Any, cap: int, embedder: SentenceEmbedder) -> Callable[[str], Chunked]:
    """Return chonkie's SemanticChunker with its default settings."""
    from chonkie import SemanticChunker
    from chonkie.embeddings import BaseEmbeddings

    class Embeddings(BaseEmbeddings):  # type: ignore[misc]
        def embed(self, text: str) -> Vectors:
            row: Vectors = embedder.encode([text])[0]
            return row

        def embed_batch(self, texts: list[str]) -> list[Vectors]:
            return list(embedder.encode(texts))

        @property
        def dimension(self) -> int:
            return int(self.embed("a").shape[0])

        def get_tokenizer(self) -> Any:
            return tokenizer

    return lambda text: [
        chunk.text for chunk in SemanticChunker(embedding_model=Embeddings(), chunk_size=cap).chunk(text)
    ]


def llama_index_semantic(_tokenizer: Any, _cap: int, embedder: SentenceEmbedder) -> Callable[[str], Chunked]:
    """Return LlamaIndex's SemanticSplitterNodeParser with its default settings; it knows no cap."""
    from llama_index.core import Document
    from llama_index.core.embeddings import BaseEmbedding
    from llama_index.core.node_parser import SemanticSplitterNodeParser

    class Embeddings(BaseEmbedding):  # type: ignore[misc]
        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return [row.tolist() for row in embedder.encode(texts)]

        def _get_text_embedding(self, text: str) -> list[float]:
            return self._get_text_embeddings([text])[0]

        def _get_query_embedding(self, query: str) -> list[float]:
            return self._get_text_embeddings([query])[0]

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return self._get_query_embedding(query)

    # As many texts a call as ragkit's own chunker hands over; the default, 10, would be slower.
    parser = SemanticSplitterNodeParser.from_defaults(embed_model=Embeddings(embed_batch_size=512))
    return lambda text: [node.get_content() for node in parser.get_nodes_from_documents([Document(text=text)])]
