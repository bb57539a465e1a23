"""The cluster chunker finds what the quadratic programme finds, without the quadratic matrix."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_doubles import BrokenEmbedder, TopicEmbedder, topic_text

from ragkit.chunking.cluster import ClusterChunker, ClusterOptions, _rewards, banded_similarity
from ragkit.chunking.length_constrained import viterbi
from ragkit.config import ChunkingConfig
from ragkit.errors import ChunkingError, UsageError
from ragkit.types import Document


def quadratic_programme(rows: np.ndarray, widest: int) -> list[int]:
    """The published programme: blocks of at most `widest` pieces, the whole matrix held."""
    matrix = rows @ rows.T
    upper = np.triu_indices(len(rows), 1)
    matrix = matrix - matrix[upper].mean()
    np.fill_diagonal(matrix, 0)
    best, opened = [0.0], []
    for stop in range(1, len(rows) + 1):
        starts = range(max(0, stop - widest), stop)
        values = [best[start] + matrix[start:stop, start:stop].sum() for start in starts]
        opened.append(starts[int(np.argmax(values))])
        best.append(max(values))
    cuts, at = [], len(rows)
    while at:
        at = opened[at - 1]
        cuts.append(at)
    return cuts[-2::-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 4, 60])
def test_the_cuts_are_those_of_the_quadratic_programme(seed, size):
    rows = np.cumsum(np.random.default_rng(seed).normal(size=(60, 6)), axis=0)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    first = np.maximum(0, np.arange(60) - 7)
    band, mean = banded_similarity([rows[start : start + size] for start in range(0, 60, size)], first)
    found = viterbi(first, _rewards(band, first, mean)).tolist()
    assert found == quadratic_programme(rows.astype(np.float64), 8)
    assert mean == pytest.approx((rows @ rows.T)[np.triu_indices(60, 1)].mean(), abs=1e-6)


def test_the_chunks_of_a_text_with_three_topics_are_the_topics(word_tokenizer):
    text = topic_text()
    chunker = ClusterChunker(
        ChunkingConfig(max_tokens=70), word_tokenizer, TopicEmbedder(), ClusterOptions(piece_tokens=12)
    )
    starts = [chunk.char_start for chunk in chunker.chunk(Document.from_text(text))]
    assert starts == [0, text.index("The ship"), text.index("The bread")]


def test_every_piece_is_embedded_once_and_only_pairs_within_the_cap_are_compared(word_tokenizer):
    embedder = TopicEmbedder()
    text = topic_text(700)
    ClusterChunker(ChunkingConfig(max_tokens=64), word_tokenizer, embedder).chunk(Document.from_text(text))
    assert "".join(embedder.asked) == text
    rows = embedder.encode(embedder.asked)
    first = np.maximum(0, np.arange(len(rows)) - 2)
    band, _ = banded_similarity([rows], first)
    assert sum(map(len, band)) == 2 * len(rows) - 3


def test_an_embedder_that_returns_nan_is_an_error(word_tokenizer):
    chunker = ClusterChunker(
        ChunkingConfig(max_tokens=8), word_tokenizer, BrokenEmbedder(), ClusterOptions(piece_tokens=4)
    )
    with pytest.raises(ChunkingError, match="not finite"):
        chunker.chunk(Document.from_text("The cat purrs. Some poison here. The end."))


def test_pieces_without_tokens_are_refused():
    with pytest.raises(UsageError, match="at least 1 token, got 0"):
        ClusterOptions(piece_tokens=0)
