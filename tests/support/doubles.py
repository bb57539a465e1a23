"""Small, deterministic stand-ins for models: quick enough for fault tests, honest in their contracts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_TOKEN = re.compile(r"\w+|[^\w\s]|\s+")


class WordTokenizer:
    """A `TextTokenizer` whose tokens are words, single punctuation marks and runs of white space."""

    tokenizer_id = "word-tokenizer-1"

    def encode(self, text: str) -> list[int]:
        return [int.from_bytes(hashlib.sha256(piece.encode()).digest()[:3]) for piece in _TOKEN.findall(text)]

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        return [len(_TOKEN.findall(text)) for text in texts]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in _TOKEN.finditer(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in token_ids)


class HashEmbedder:
    """An `Embedder` of hashed words: texts that share words lie close. Counts what it is asked for."""

    def __init__(self, dim: int = 16, name: str = "hash") -> None:
        self.dim = dim
        self.embedder_id = f"{name}@{dim}"
        self.max_tokens = 256
        self.backend = "double"
        self.texts_embedded = 0

    def encode(self, texts: Sequence[str], on_tokens: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        self.texts_embedded += len(texts)
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                digest = hashlib.sha256(word.encode()).digest()
                vectors[row, digest[0] % self.dim] += 1.0 if digest[1] & 1 else -1.0
            if not vectors[row].any():
                vectors[row, 0] = 1.0
            if on_tokens:
                on_tokens(len(text) // 4)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.encode(texts)
