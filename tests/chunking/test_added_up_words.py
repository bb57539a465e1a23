"""Where a tokenizer's words add up, chunks are counted from their words, exactly as if they had been tokenised."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ragkit.chunking.base import check_chunks
from ragkit.chunking.registry import create_chunker
from ragkit.chunking.words import WordCounter
from ragkit.config import ChunkingConfig
from ragkit.errors import OfflineError
from ragkit.models.resolve import resolve
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.types import Document

PIECES = st.sampled_from(
    [
        *("word ", "Is it? ", "don't ", "\n", "\n\n", "\r\n", " ", "\t", "\x00", "\x0b", "\x0c", "\x1c", "\x85"),
        *("\u2028", "\ufeff", "\xa0", "\u200b", "\u3000", "x" * 70, "e\u0301", " \u0301", "ΣΑΣ ", "İ", "这是", "。"),
        *("\U0001f600", "http://a.b/c?d=e&f=g#h-i-j-k-l-m-n-o", "[MASK]", " [SEP] ", "-"),
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=60).map("".join), st.text(st.characters(codec="utf-8"), max_size=200))


@pytest.fixture(scope="module")
def embedder_tokenizer():
    try:
        return ModelTokenizer(resolve("all-minilm-l6-v2", offline=True))
    except OfflineError as error:
        pytest.skip(str(error))


@pytest.mark.models
@pytest.mark.parametrize("name", ["recursive", "sentence", "token"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, cap=st.integers(8, 60), overlap=st.integers(0, 5))
@example(text="a\x0cb " * 20, cap=8, overlap=0)
@example(text=("x" * 70 + " word ") * 9, cap=12, overlap=0)
def test_counts_are_those_of_the_chunks_themselves(name, embedder_tokenizer, text, cap, overlap):
    document = Document.from_text(text)
    chunks = create_chunker(ChunkingConfig(name, cap, overlap), embedder_tokenizer).chunk(document)
    check_chunks(document, chunks, cap)
    assert [chunk.token_count for chunk in chunks] == embedder_tokenizer.count_batch([chunk.text for chunk in chunks])


@pytest.mark.models
def test_the_words_of_bert_add_up_and_those_of_byte_level_bpe_do_not(embedder_tokenizer, bundled_tokenizer):
    assert embedder_tokenizer.words_add_up
    assert not bundled_tokenizer.words_add_up


@pytest.mark.parametrize(("adds_up", "most"), [(True, 0.1), (False, 1.1)])
def test_only_words_are_tokenised_where_they_add_up(word_tokenizer, adds_up, most):
    word_tokenizer.words_add_up = adds_up
    text = "The cat sat on the mat. It was flat.\n\n" * 1000
    chunks = create_chunker(ChunkingConfig("recursive", 100), word_tokenizer).chunk(Document.from_text(text))
    assert len(chunks) > 100
    assert word_tokenizer.characters <= most * len(text)


def test_a_span_whose_edge_goes_through_a_word_or_that_holds_a_torn_one_is_left_to_be_counted(word_tokenizer):
    word_tokenizer.words_add_up = True
    text = "one two " + "x" * 70 + " three"
    words = WordCounter(word_tokenizer).measure(text)
    spans = [(0, 8), (4, 8), (5, 8), (0, 78), (8, 40), (78, 84), (79, 84)]
    assert words.true_counts(text, spans) == [2, 1, None, None, None, 1, 1]
