"""The minima rule is that of the paper, on exact text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loss_doubles import TableLosses

from ragkit.chunking.base import check_chunks
from ragkit.chunking.perplexity import (
    PerplexityOptions,
    PerplexityScorer,
    minima_log_odds,
    perplexity_chunker,
    sentence_losses,
)
from ragkit.config import ChunkingConfig
from ragkit.errors import ChunkingError, UsageError
from ragkit.types import Document


def published_minima(values, threshold):
    """The rule as the paper's code has it."""
    found = []
    for i in range(1, len(values) - 1):
        left, right = values[i - 1] - values[i], values[i + 1] - values[i]
        lowest = left > 0 and right > 0 and (left >= threshold or right >= threshold)
        if lowest or (left > 0 and right == 0 and left >= threshold):
            found.append(i)
    return found


def published_dynamic_minima(values, threshold):
    found, drops = [], []
    for i in range(1, len(values) - 1):
        left, right = values[i - 1] - values[i], values[i + 1] - values[i]
        lowest = left > 0 and right > 0 and (left >= threshold or right >= threshold)
        if lowest or (left > 0 and right == 0 and left >= threshold):
            found.append(i)
            drops.append(min(left, right))
            if len(drops) >= 100:
                threshold = min(drops)
    return found


@given(
    values=st.lists(st.integers(0, 12), min_size=0, max_size=60), threshold=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.5])
)
def test_the_cuts_are_the_published_minima(values, threshold):
    losses = np.array(values, dtype=np.float64) / 4
    odds = minima_log_odds(losses, threshold)
    assert np.flatnonzero(odds > 0).tolist() == published_minima(losses.tolist(), threshold)
    assert len(odds) == max(0, len(values) - 1)


def test_the_dynamic_threshold_is_the_published_one():
    losses = np.round(np.random.default_rng(3).normal(3, 1, size=900) * 64) / 64
    found = np.flatnonzero(minima_log_odds(losses, 1.2, dynamic=True) > 0).tolist()
    assert found == published_dynamic_minima(losses.tolist(), 1.2)
    assert found != published_minima(losses.tolist(), 1.2)


def test_the_loss_of_a_sentence_is_the_mean_over_its_tokens():
    losses = np.array([1, 3, 5, 7], np.float32)
    owners = np.array([0, 0, 1, 1, 3])
    assert sentence_losses(losses, owners, 5).tolist() == [1, 4, 4, 7, 7]


TEXT = "One is high. Two is low. Three is high. Four is high. Five is low. Six is high."
LOW = {"Two", "Five"}


def chunker(tokenizer, cap=256, overlap_tokens=0, **options):
    scorer = PerplexityScorer(TableLosses(tokenizer, LOW), tokenizer, "table@1", PerplexityOptions(**options))
    return perplexity_chunker(ChunkingConfig(max_tokens=cap, overlap_tokens=overlap_tokens), tokenizer, scorer)


def texts(some):
    return [chunk.text.strip() for chunk in some]


def test_the_sentence_at_a_minimum_ends_its_chunk(word_tokenizer):
    assert texts(chunker(word_tokenizer).chunk(Document.from_text(TEXT))) == [
        "One is high. Two is low.",
        "Three is high. Four is high. Five is low.",
        "Six is high.",
    ]


def test_with_the_overlap_the_minimum_stands_in_both_chunks(word_tokenizer):
    document = Document.from_text(TEXT)
    found = chunker(word_tokenizer, overlap=True).chunk(document)
    check_chunks(document, found, 256)
    assert texts(found) == [
        "One is high. Two is low.",
        "Two is low. Three is high. Four is high. Five is low.",
        "Five is low. Six is high.",
    ]


def test_the_overlap_counts_for_the_cap(word_tokenizer):
    document = Document.from_text(TEXT * 9)
    found = chunker(word_tokenizer, cap=11, overlap=True).chunk(document)
    check_chunks(document, found, 11)
    assert max(chunk.token_count for chunk in found) == 9


def test_a_threshold_above_the_drop_leaves_one_chunk(word_tokenizer):
    assert len(chunker(word_tokenizer, threshold=9.0).chunk(Document.from_text(TEXT))) == 1


def test_dynamic_merge_joins_from_the_left_while_it_fits(word_tokenizer):
    document = Document.from_text(TEXT)
    assert len(chunker(word_tokenizer, merge_tokens=100).chunk(document)) == 1
    assert texts(chunker(word_tokenizer, merge_tokens=21).chunk(document)) == [
        "One is high. Two is low. Three is high. Four is high. Five is low.",
        "Six is high.",
    ]


def test_every_token_is_given_to_the_model_once(word_tokenizer):
    model = TableLosses(word_tokenizer, LOW)
    scorer = PerplexityScorer(model, word_tokenizer, "table@1", PerplexityOptions())
    text = TEXT * 3000
    perplexity_chunker(ChunkingConfig(), word_tokenizer, scorer).chunk(Document.from_text(text))
    assert model.tokens == pytest.approx(len(word_tokenizer.encode(text)), rel=1e-3)


def test_documents_together_are_cut_as_alone(word_tokenizer):
    documents = [Document.from_text(TEXT * count) for count in (1, 3, 0)]
    many = chunker(word_tokenizer)
    assert many.chunk_many(documents) == [many.chunk(document) for document in documents]


def test_a_loss_that_is_not_finite_is_an_error(word_tokenizer):
    with pytest.raises(ChunkingError, match="not finite for token 3"):
        sentence_losses(np.array([1, 2, np.nan], np.float32), np.array([0, 0, 1, 1]), 2)


def test_two_overlaps_exclude_each_other(word_tokenizer):
    with pytest.raises(UsageError, match="exclude"):
        chunker(word_tokenizer, overlap_tokens=4, overlap=True)


def test_a_negative_threshold_is_refused():
    with pytest.raises(UsageError, match="at least 0, got -1"):
        PerplexityOptions(threshold=-1)
