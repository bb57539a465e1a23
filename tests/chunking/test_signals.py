from itertools import pairwise

import numpy as np
import pytest
from embedding_doubles import TopicEmbedder

from ragkit.chunking.balanced import balanced_chunker
from ragkit.chunking.cluster import ClusterChunker, ClusterOptions
from ragkit.chunking.recursive import recursive_chunker
from ragkit.chunking.signals import BoundaryKind, BoundarySignals, SignalChunker, boundary_kinds
from ragkit.config import ChunkingConfig
from ragkit.types import Document

TEXT = """# Guide

The cat sat. It purred.

## Sizes

One line
another line

| name | size |
|---|---|
| cat | 3 |
| dog | 9 |
"""


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("## Sizes", BoundaryKind.HEADING),
        ("| cat", BoundaryKind.TABLE_ROW),
        ("| dog", BoundaryKind.TABLE_ROW),
        ("| name", BoundaryKind.PARAGRAPH),
        ("another", BoundaryKind.LINE),
        ("It purred", BoundaryKind.SENTENCE),
        ("sat", BoundaryKind.WORD),
        ("urred", BoundaryKind.INSIDE_WORD),
    ],
)
def test_the_kind_of_a_boundary_is_the_strongest_that_fits(place, kind):
    assert boundary_kinds(TEXT, [TEXT.index(place)]) == [kind]


def test_a_value_is_looked_up_by_its_place():
    signals = BoundarySignals("m", np.array([3, 8]), np.array([0.5, 0.25]), None, np.array([True, False]))
    assert [signals.value_at(offset) for offset in (0, 3, 8, 9)] == [None, 0.5, 0.25, None]


def test_chunkers_that_only_pack_have_no_signal(word_tokenizer):
    assert not isinstance(recursive_chunker(ChunkingConfig(), word_tokenizer), SignalChunker)


def test_the_balanced_chunker_shows_the_odds_that_the_layout_gives(word_tokenizer):
    chunker = balanced_chunker(ChunkingConfig(max_tokens=64), word_tokenizer)
    _, signals = chunker.chunk_with_signals(Document.from_text("One. Two.\n\nThree."))
    assert signals.values.tolist() == [0.0, 2.0]
    assert signals.threshold == 0.0


def test_the_cluster_chunker_shows_the_similarity_across_each_boundary(byte_tokenizer):
    embedder = TopicEmbedder()
    text = "The cat. The cat. The ship. The ship. "
    chunker = ClusterChunker(ChunkingConfig(max_tokens=40), byte_tokenizer, embedder, ClusterOptions(10))
    _, signals = chunker.chunk_with_signals(Document.from_text(text))
    edges = [0, *signals.offsets.tolist(), len(text)]
    vectors = embedder.encode([text[start:stop] for start, stop in pairwise(edges)])
    np.testing.assert_allclose(signals.values, (vectors[:-1] * vectors[1:]).sum(axis=1), atol=1e-6)
    pairs = vectors @ vectors.T
    assert signals.threshold == pytest.approx(pairs[~np.eye(len(vectors), dtype=bool)].mean(), abs=1e-6)
