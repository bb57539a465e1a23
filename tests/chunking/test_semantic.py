"""Similarity is measured between blocks of sentence vectors, and each sentence is embedded once."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_doubles import BrokenEmbedder, TopicEmbedder, topic_text

from ragkit.chunking.breakpoints import BreakpointRule
from ragkit.chunking.length_constrained import GaussianPrior
from ragkit.chunking.semantic import SemanticOptions, block_distances, semantic_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import ChunkingError, UsageError
from ragkit.types import Document


def slow_distances(rows, window):
    result = []
    for at in range(1, len(rows)):
        left = rows[max(0, at - window) : at].mean(axis=0)
        right = rows[at : at + window].mean(axis=0)
        result.append(1 - left @ right / np.linalg.norm(left) / np.linalg.norm(right))
    return result


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_block_distances_do_not_depend_on_how_the_vectors_arrive(window, size):
    rows = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    pieces = [rows[start : start + size] for start in range(0, 40, size)]
    assert block_distances(pieces, window) == pytest.approx(slow_distances(rows, window), abs=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_text_of_few_sentences_has_one_boundary_less(count):
    assert len(block_distances([np.ones((count, 3), np.float32)] if count else [], 3)) == max(0, count - 1)


@pytest.mark.parametrize(
    ("rule", "amount"),
    [
        (BreakpointRule.PERCENTILE, 88),
        (BreakpointRule.STANDARD_DEVIATION, 1.5),
        (BreakpointRule.LOCAL_MINIMUM, 80),
    ],
)
def test_the_chunks_of_a_text_with_three_topics_are_the_topics(word_tokenizer, rule, amount):
    text = topic_text()
    chunker = semantic_chunker(
        ChunkingConfig(max_tokens=200), word_tokenizer, TopicEmbedder(), SemanticOptions(rule, amount)
    )
    third = text.index("The ship"), text.index("The bread")
    assert [chunk.char_start for chunk in chunker.chunk(Document.from_text(text))] == [0, *third]


def test_the_gradient_rule_cuts_where_the_distance_rises_fastest(word_tokenizer):
    options = SemanticOptions(BreakpointRule.GRADIENT, 85, window=1)
    chunker = semantic_chunker(ChunkingConfig(max_tokens=200), word_tokenizer, TopicEmbedder(), options)
    _, signals = chunker.chunk_with_signals(Document.from_text(topic_text()))
    steepest = np.argsort(np.gradient(signals.values))[-2:]
    assert set(steepest.tolist()) <= set(np.flatnonzero(signals.cut).tolist())


def test_every_sentence_is_embedded_once(word_tokenizer):
    embedder = TopicEmbedder()
    text = topic_text(400)
    chunks = semantic_chunker(ChunkingConfig(max_tokens=64), word_tokenizer, embedder).chunk(Document.from_text(text))
    assert len(chunks) > 100
    assert len(embedder.asked) == 1200
    assert "".join(embedder.asked) == text


def test_documents_together_are_cut_as_alone_in_fewer_calls(word_tokenizer):
    documents = [Document.from_text(topic_text(count)) for count in (2, 1, 9)] + [Document.from_text("")]
    chunker = semantic_chunker(ChunkingConfig(max_tokens=64), word_tokenizer, TopicEmbedder())
    assert chunker.chunk_many(documents) == [chunker.chunk(document) for document in documents]


def test_under_the_cap_the_cuts_fall_on_the_topics_first(word_tokenizer):
    text = topic_text()
    chunker = semantic_chunker(
        ChunkingConfig(max_tokens=60), word_tokenizer, TopicEmbedder(), SemanticOptions(amount=88)
    )
    chunks = chunker.chunk(Document.from_text(text))
    assert max(chunk.token_count for chunk in chunks) <= 60
    assert {text.index("The ship"), text.index("The bread")} <= {chunk.char_start for chunk in chunks}


def test_a_prior_pulls_the_chunks_to_its_length(word_tokenizer):
    text = topic_text(40)
    prior = GaussianPrior(80, 4)
    chunker = semantic_chunker(ChunkingConfig(max_tokens=200), word_tokenizer, TopicEmbedder(), prior=prior)
    counts = [chunk.token_count for chunk in chunker.chunk(Document.from_text(text))]
    assert np.mean(counts) == pytest.approx(80, abs=8)


def test_odds_for_paragraphs_make_cuts_at_paragraphs(word_tokenizer):
    text = topic_text().replace("came 2. ", "came 2.\n\n", 1)
    topics = {0, text.index("The ship"), text.index("The bread")}
    config = ChunkingConfig(max_tokens=200)
    bare = semantic_chunker(config, word_tokenizer, TopicEmbedder(), SemanticOptions(amount=88))
    options = SemanticOptions(amount=88, paragraph_log_odds=9.0)
    paragraphs = semantic_chunker(config, word_tokenizer, TopicEmbedder(), options)
    assert {chunk.char_start for chunk in bare.chunk(Document.from_text(text))} == topics
    starts = {chunk.char_start for chunk in paragraphs.chunk(Document.from_text(text))}
    assert starts == topics | {text.index("\n\n") + 2}


def test_an_embedder_that_returns_nan_is_an_error_that_names_the_sentence(word_tokenizer):
    chunker = semantic_chunker(ChunkingConfig(), word_tokenizer, BrokenEmbedder())
    with pytest.raises(ChunkingError, match=r"topics@1 returned a vector that is not finite.*'Some poison here"):
        chunker.chunk(Document.from_text("The cat purrs. Some poison here. The end."))


def test_the_fingerprint_changes_with_rule_and_embedder(word_tokenizer):
    other = TopicEmbedder()
    other.embedder_id = "other@1"
    prints = {
        semantic_chunker(ChunkingConfig(), word_tokenizer, embedder, options).fingerprint
        for embedder in (TopicEmbedder(), other)
        for options in (SemanticOptions(), SemanticOptions(amount=90), SemanticOptions(window=2))
    }
    assert len(prints) == 6


def test_a_window_of_no_sentence_is_refused():
    with pytest.raises(UsageError, match="at least 1 sentence, got 0"):
        SemanticOptions(window=0)
