"""Rankings of chunks by words, by vectors and by both."""

from __future__ import annotations

import math

import numpy as np
import pytest
from doubles import HashEmbedder, WordTokenizer

from ragkit.bench.chunking_rankings import Mode, bm25_scores, rank
from ragkit.bench.question_sets import Metric, Question, QuestionSet
from ragkit.chunking.recursive import recursive_chunker
from ragkit.config import ChunkingConfig
from ragkit.retrieval.chunk_vectors import SeparateChunks
from ragkit.types import Document

TEXT = "Frogs live in ponds.\n\nStars shine at night.\n\nToads prefer gardens.\n"


def test_bm25_is_that_of_the_formula():
    texts = ["frog frog pond", "frog star", "star star star star"]
    scores = bm25_scores(texts, ["A FROG?", "nothing"])
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))

    def term(count, length):
        return idf * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * length / 3))

    np.testing.assert_allclose(scores, [[term(2, 3), term(1, 2), 0.0], [0.0, 0.0, 0.0]])


def ranking(questions):
    documents = {"a": Document.from_text(TEXT, uri="a")}
    data = QuestionSet("s", documents, [Question(text, (("a", 0, 5),)) for text in questions], Metric.HIT, 50)
    chunker = recursive_chunker(ChunkingConfig(max_tokens=10), WordTokenizer())
    embedder = HashEmbedder()
    return rank(data, chunker, 10, SeparateChunks(embedder), embedder)


def test_every_mode_ranks_every_chunk_and_finds_the_right_one_first():
    found = ranking(["stars shine at night", "toads prefer gardens"])
    assert [TEXT[start:stop].split()[0] for _, start, stop in found.spans] == ["Frogs", "Stars", "Toads"]
    for mode in Mode:
        assert found.rows[mode][:, 0].tolist() == [1, 2]
        assert sorted(row for row in found.rows[mode][0].tolist() if row >= 0) == [0, 1, 2]
    assert found.mean_characters == pytest.approx(len(TEXT) / 3)


def test_what_is_retrieved_is_cut_to_the_budget():
    found = ranking(["stars shine at night"])
    first = found.spans[1]
    assert found.retrieved(Mode.BM25, 0, 10) == [("a", first[1], first[1] + 10)]
    assert sum(stop - start for _, start, stop in found.retrieved(Mode.HYBRID, 0, 10_000)) == len(TEXT)
