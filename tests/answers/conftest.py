"""Hits over a document, and an embedder whose similarities are known by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from ragkit.answers.base import RankedChunk
from ragkit.types import Chunk, Document, PageSpan, chunk_id_of


class LetterEmbedder:
    """Unit vectors of letter counts: texts of the same letters are equal. Counts the texts it embeds."""

    embedder_id = "letters@26"
    dim = 26
    max_tokens = 256

    def __init__(self) -> None:
        self.texts = 0

    def encode(self, texts: Sequence[str], on_tokens=None) -> np.ndarray:
        self.texts += len(texts)
        rows = np.array([[text.lower().count(chr(97 + place)) for place in range(26)] for text in texts], np.float32)
        rows[:, 0] += 1e-3
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        self.texts -= len(texts)
        return self.encode(texts)


def hits_over(document: Document, cuts: Sequence[int], dense: Sequence[float | None] | None = None):
    """Return one hit a stretch between neighbouring `cuts`, ranked in reading order."""
    hits = []
    for index, (start, stop) in enumerate(pairwise(cuts)):
        text = document.text[start:stop]
        chunk_id = chunk_id_of(document.doc_id, start, stop)
        page = document.page_at(start)
        chunk = Chunk(chunk_id, document.doc_id, index, text, start, stop, len(text.split()), page)
        similarity = 0.6 - 0.05 * index if dense is None else dense[index]
        hits.append(RankedChunk(chunk, document.uri, 1 / (61 + index), similarity, None, index + 1))
    return hits


@pytest.fixture
def embedder():
    return LetterEmbedder()


@pytest.fixture
def over():
    return hits_over


TOWERS = (
    "The Eiffel Tower stands in Paris. It was built by Gustave Eiffel between 1887 and 1889. "
    "Its height is 330 metres. Millions of people visit it every year.\n\n"
    "The Leaning Tower stands in Pisa. Its construction began in 1173 and took 199 years. "
    "It leans because the ground on one side is soft.\n\n"
    "Tokyo Tower was finished in 1958. It is painted white and orange for the safety of planes."
)


@pytest.fixture
def towers():
    middle = TOWERS.index("The Leaning")
    last = TOWERS.index("Tokyo")
    pages = [PageSpan(1, 0, 60), PageSpan(2, 60, middle), PageSpan(3, middle, len(TOWERS))]
    document = Document.from_text(TOWERS, uri="towers.txt", pages=pages)
    return document, hits_over(document, [0, middle, last, len(TOWERS)])
