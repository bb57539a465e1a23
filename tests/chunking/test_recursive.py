from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.chunking.registry import create_chunker
from ragkit.config import ChunkingConfig
from ragkit.types import Document


def texts(name, tokenizer, text, cap, overlap=0):
    chunks = create_chunker(ChunkingConfig(name, cap, overlap), tokenizer).chunk(Document.from_text(text))
    return [chunk.text for chunk in chunks]


def test_paragraphs_are_packed_up_to_the_cap(byte_tokenizer):
    text = "aaaa\n\nbbbb\n\ncccc\n\ndddd"
    assert texts("recursive", byte_tokenizer, text, 13) == ["aaaa\n\nbbbb\n\n", "cccc\n\ndddd"]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_a_paragraph_that_fits_is_never_cut(doubles, sizes):
    paragraphs = ["w" * size + "\n\n" for size in sizes]
    chunks = texts("recursive", doubles["byte"](), "".join(paragraphs), 40)
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + len(chunk))
    at = 0
    for paragraph in paragraphs:
        inner = [start for start in starts if at < start < at + len(paragraph)]
        assert not inner or len(paragraph) > 40
        at += len(paragraph)


def test_a_long_paragraph_is_cut_at_lines_then_sentences_then_words(byte_tokenizer):
    assert texts("recursive", byte_tokenizer, "one two\nthree\nfour five", 14) == ["one two\nthree\n", "four five"]
    assert texts("recursive", byte_tokenizer, "One is. Two is. Three is.", 18) == ["One is. Two is. ", "Three is."]
    assert texts("recursive", byte_tokenizer, "one two three four", 9) == ["one two", " three", " four"]


def test_a_markdown_heading_stays_with_what_follows(byte_tokenizer):
    text = "Before it all.\n\n# Heading\n\n## Sub\n\nText of the section."
    assert texts("recursive", byte_tokenizer, text, 45)[0] == "Before it all.\n\n"
    underlined = "Before it all.\n\nHeading\n=======\n\nText of the section."
    assert texts("recursive", byte_tokenizer, underlined, 40)[0] == "Before it all.\n\n"
    assert texts("sentence", byte_tokenizer, text, 45)[0] == "Before it all.\n\n"


def test_code_keeps_the_indentation_with_its_line(byte_tokenizer):
    text = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    assert texts("recursive", byte_tokenizer, text, 15) == [
        "def f():\n",
        "    return 1\n\n\n"[:15],
        "def g():\n",
        "    return 2\n",
    ]


def test_the_sentence_chunker_packs_across_paragraphs(byte_tokenizer):
    text = "One is.\n\nTwo is.\n\nThree is."
    assert texts("sentence", byte_tokenizer, text, 18) == ["One is.\n\nTwo is.\n\n", "Three is."]


def test_the_token_chunker_fills_chunks_with_whole_words(word_tokenizer):
    text = " ".join(f"word{number}" for number in range(100))
    chunks = texts("token", word_tokenizer, text, 32)
    assert [len(word_tokenizer.encode(chunk)) for chunk in chunks] == [32, 32, 32, 4]


def test_a_bundled_tokenizer_chunk_is_filled_to_99_percent(bundled_tokenizer):
    text = "".join(
        f"In {1900 + n % 90}, the committee's {n}th report (see §{n}) said: “costs rose by {n}.{n % 7}%”.\n"
        for n in range(900)
    )
    chunks = texts("token", bundled_tokenizer, text, 256)
    counts = bundled_tokenizer.count_batch(chunks[:-1])
    assert sum(counts) / len(counts) >= 0.99 * 256


@pytest.mark.parametrize("name", ["recursive", "sentence", "token"])
def test_an_overlap_repeats_the_end_of_the_chunk_before(name, word_tokenizer):
    text = " ".join(f"Sentence {number} has six words." for number in range(60))
    chunks = create_chunker(ChunkingConfig(name, 40, 12), word_tokenizer).chunk(Document.from_text(text))
    for before, after in pairwise(chunks):
        repeated = text[after.char_start : before.char_stop]
        assert 6 <= word_tokenizer.count_batch([repeated])[0] <= 13


def test_an_overlap_starts_at_a_sentence_where_it_can(word_tokenizer):
    text = " ".join(f"Sentence {number} has six words." for number in range(60))
    chunks = create_chunker(ChunkingConfig("recursive", 40, 12), word_tokenizer).chunk(Document.from_text(text))
    assert all(chunk.text.startswith("Sentence") for chunk in chunks)
