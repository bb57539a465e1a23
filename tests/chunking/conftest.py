"""Tokenizer doubles whose counts are known by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest


class ByteTokenizer:
    """One token a UTF-8 byte: exactly additive, and a code point can have four tokens."""

    tokenizer_id = "byte-double"

    def __init__(self) -> None:
        self.characters = 0

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return list(text.encode("utf-8", "surrogatepass"))

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        return [len(self.encode(text)) for text in texts]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        sizes = [len(char.encode("utf-8", "surrogatepass")) for char in text]
        return [(at, at + 1) for at, size in enumerate(sizes) for _ in range(size)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("utf-8", "surrogatepass")


class WordTokenizer(ByteTokenizer):
    """One token a word with its leading space, one a punctuation mark, like a BPE with a large vocabulary."""

    tokenizer_id = "word-double"
    pattern = re.compile(r" ?\w+| ?[^\w\s]|\s+(?!\S)|\s")

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return [hash(match) & 0xFFFF for match in self.pattern.findall(text)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in self.pattern.finditer(text)]


class SurchargeTokenizer(ByteTokenizer):
    """A byte a token, and one more for every ten: a long text has more tokens than its words together."""

    tokenizer_id = "surcharge-double"

    def encode(self, text: str) -> list[int]:
        ids = super().encode(text)
        return ids + [0] * (len(ids) // 10)


class PairTokenizer(ByteTokenizer):
    """Two characters a token across word borders: a long text has fewer tokens than its words together."""

    tokenizer_id = "pair-double"

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return [0] * ((len(text) + 1) // 2)


DOUBLES = {"byte": ByteTokenizer, "word": WordTokenizer, "surcharge": SurchargeTokenizer, "pair": PairTokenizer}


@pytest.fixture(scope="session")
def doubles():
    return DOUBLES


@pytest.fixture
def byte_tokenizer():
    return ByteTokenizer()


@pytest.fixture
def word_tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="session")
def bundled_tokenizer():
    from ragkit.errors import OfflineError
    from ragkit.models.resolve import resolve
    from ragkit.models.tokenizer import ModelTokenizer

    try:
        return ModelTokenizer(resolve("smollm2-135m-instruct", offline=True))
    except OfflineError as error:
        pytest.skip(str(error))
