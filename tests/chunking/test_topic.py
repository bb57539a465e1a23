"""The topic chunker keeps paragraphs whole, asks the head about neighbours, and embeds each paragraph once."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_doubles import TopicEmbedder

from ragkit.chunking.boundary_head import BoundaryHead, load_boundary_head
from ragkit.chunking.topic import SHIPPED_TOPIC_HEAD, topic_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import UsageError
from ragkit.types import Document

CATS = "The cat purrs. Its whisker shakes.\n\n", "A whisker of a cat.\n\n", "Cats? A cat!\n\n"
SHIPS = "The ship sails. Into the harbour.\n\n", "A sail in a harbour.\n\n"


def product_head():
    """The log-odds are 8 (x1 . x2) - 4."""
    weight = np.zeros((4, 16), np.float32)
    weight[:, 12:] = 8 * np.eye(4)
    return BoundaryHead(weight, np.zeros(4, np.float32), np.ones(4, np.float32), -4.0, "topics@1")


def chunker_of(tokenizer, cap=256, embedder=None):
    return topic_chunker(ChunkingConfig(max_tokens=cap), tokenizer, embedder or TopicEmbedder(), product_head())


def texts(tokenizer, text, cap=256):
    return [chunk.text for chunk in chunker_of(tokenizer, cap).chunk(Document.from_text(text))]


def test_paragraphs_of_one_topic_stay_together_and_a_new_topic_opens_a_chunk(word_tokenizer):
    assert texts(word_tokenizer, "".join(CATS + SHIPS)) == ["".join(CATS), "".join(SHIPS)]


def test_the_cap_is_held_between_paragraphs(word_tokenizer):
    chunks = texts(word_tokenizer, "".join(CATS * 4), 30)
    assert len(chunks) > 2
    assert all(chunk.endswith("\n\n") for chunk in chunks)


def test_a_paragraph_over_the_cap_is_cut_at_sentences_and_nothing_else_is(word_tokenizer):
    long = "The cat purrs and purrs. " * 10 + "\n\n"
    chunks = texts(word_tokenizer, SHIPS[0] + long + SHIPS[1], 30)
    assert chunks[0] == SHIPS[0]
    assert chunks[-1] == SHIPS[1]
    assert all(chunk.endswith("purrs. ") for chunk in chunks[1:-2])


def test_lines_are_the_paragraphs_where_there_is_no_blank_line(word_tokenizer):
    text = "".join(part.replace("\n\n", "\n") for part in CATS + SHIPS)
    assert len(texts(word_tokenizer, text)) == 2


def test_a_numbered_clause_opens_a_paragraph_with_its_heading(word_tokenizer):
    text = "The cat purrs.\nArticle 2 Ships\nThe ship sails.\n\nA sail in a harbour.\n\n"
    embedder = TopicEmbedder()
    chunks = chunker_of(word_tokenizer, embedder=embedder).chunk(Document.from_text(text))
    assert embedder.asked[1] == "Article 2 Ships\nThe ship sails.\n\n"
    assert [chunk.text for chunk in chunks] == [text[:15], text[15:]]


def test_every_paragraph_is_embedded_once(word_tokenizer):
    embedder = TopicEmbedder()
    chunker_of(word_tokenizer, embedder=embedder).chunk(Document.from_text("".join(CATS + SHIPS)))
    assert embedder.asked == [*CATS, *SHIPS]


def test_the_signal_is_the_probability_of_one_section(word_tokenizer):
    _, signals = chunker_of(word_tokenizer).chunk_with_signals(Document.from_text("".join(CATS + SHIPS)))
    assert signals.measure == "probability of one section"
    assert (signals.values < signals.threshold).tolist() == [False, False, True, False] == signals.cut.tolist()


def test_a_head_for_another_embedder_is_refused_with_the_script_that_trains_one(word_tokenizer):
    with pytest.raises(UsageError, match=r"train a head with benchmarks/train_topic_head\.py"):
        topic_chunker(ChunkingConfig(), word_tokenizer, TopicEmbedder())


@pytest.mark.models
def test_the_shipped_head_fits_the_bundled_embedder_and_knows_a_change_of_topic():
    from ragkit.config import EmbeddingConfig
    from ragkit.retrieval.embedders import load_embedder

    head = load_boundary_head(SHIPPED_TOPIC_HEAD)
    embedder = load_embedder(EmbeddingConfig(), offline=True)
    assert (head.dim, head.embedder_id) == (embedder.dim, embedder.embedder_id)
    assert SHIPPED_TOPIC_HEAD.stat().st_size < 500_000
    same, other = "The tenant shall pay the rent on the first of each month.", "Either party may terminate on notice."
    rows = embedder.encode(["Rent is 1,000 a month and rises each year.", same, other])
    together, apart = head.log_odds_together(rows[[0, 0]], rows[[1, 2]])
    assert together > apart
