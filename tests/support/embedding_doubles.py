"""Embedder doubles whose vectors are known by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TOPICS = (("cat", "purr", "whisker"), ("ship", "sail", "harbour"), ("bread", "oven", "flour"))


class TopicEmbedder:
    """Counts the words of three topics; keeps what it was asked for."""

    embedder_id = "topics@1"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += texts
        vectors = np.full((len(texts), len(TOPICS) + 1), 0.0, np.float32)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())
            vectors[row] = [*(sum(word in topic for word in words) for topic in TOPICS), 0.3 + (len(text) % 7) / 100]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class BrokenEmbedder(TopicEmbedder):
    """Returns NaN for texts that hold `poison`."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = super().encode(texts)
        vectors[["poison" in text for text in texts]] = np.nan
        return vectors


def topic_text(sentences_each: int = 6) -> str:
    """Return three paragraphs without a paragraph break between them: cats, ships, bread."""
    lines = [
        f"The {topic[n % 3]} and the {topic[(n + 1) % 3]} came {n}. " for topic in TOPICS for n in range(sentences_each)
    ]
    return "".join(lines)
