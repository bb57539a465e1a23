"""Chunks are even, and paragraphs decide where they end."""

from __future__ import annotations

import numpy as np
import pytest

from ragkit.chunking.balanced import BalancedOptions, balanced_chunker
from ragkit.chunking.recursive import recursive_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import UsageError
from ragkit.types import Document


def counts(chunker, text):
    return [chunk.token_count for chunk in chunker.chunk(Document.from_text(text))]


def test_chunks_of_plain_sentences_have_the_target_length(word_tokenizer):
    found = counts(balanced_chunker(ChunkingConfig(max_tokens=120), word_tokenizer), "The cat sat on the mat. " * 300)
    assert np.mean(found) == pytest.approx(80, abs=4)
    assert min(found) > 60


def test_no_small_rest_is_left_behind_a_full_chunk(word_tokenizer):
    # A paragraph a little over the cap: greedy packing leaves a rest of one sentence.
    text = "The cat sat on the mat. " * 15 + "\n\n"
    config = ChunkingConfig(max_tokens=100)
    assert min(counts(recursive_chunker(config, word_tokenizer), text * 20)) < 20
    assert min(counts(balanced_chunker(config, word_tokenizer), text * 20)) > 40


def test_a_paragraph_near_the_target_is_one_chunk(word_tokenizer):
    paragraphs = ["The cat sat on the mat. " * size + "\n\n" for size in (9, 11, 10, 8, 12)]
    chunks = balanced_chunker(ChunkingConfig(max_tokens=105), word_tokenizer).chunk(
        Document.from_text("".join(paragraphs))
    )
    assert [chunk.text for chunk in chunks] == paragraphs


def test_a_target_over_the_cap_is_refused():
    with pytest.raises(UsageError, match=r"\(0, 1\] of the cap, got 1.5"):
        BalancedOptions(target_share=1.5)
