"""Under a cap of characters chunks are packed as under one of tokens, and no word is counted."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragkit.chunking.base import check_chunks
from ragkit.chunking.characters import CharacterChunker, CharacterTokenizer
from ragkit.chunking.registry import create_chunker
from ragkit.chunking.words import WordCounter
from ragkit.config import ChunkingConfig, LengthPriorName
from ragkit.types import Document, TextTokenizer

NAMES = ("recursive", "sentence", "token")
PIECES = st.sampled_from(
    [
        *("word ", "Is it? ", "Dr. No met U.S. agents. ", "\n", "\n\n", "\r\n", "\x00", "# Title\n\n", "- item\n"),
        *("これは文です。", "x" * 70, "e\u0301" * 9, "\ud83d", "\U0001f468\u200d\U0001f469\u200d\U0001f467"),
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=60).map("".join), st.text(max_size=300))
every_chunker = pytest.mark.parametrize("name", NAMES)


def chunks_of(name, text, cap, overlap=0):
    chunker = create_chunker(ChunkingConfig(name, cap, overlap), CharacterTokenizer())
    assert isinstance(chunker, CharacterChunker)
    return chunker.chunk(Document.from_text(text))


@every_chunker
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, cap=st.integers(1, 80), data=st.data())
def test_chunks_keep_the_contract_on_any_text(name, text, cap, data):
    overlap = data.draw(st.integers(0, cap - 1))
    chunks = chunks_of(name, text, cap, overlap)
    check_chunks(Document.from_text(text), chunks, cap)
    assert all(chunk.token_count == len(chunk.text) for chunk in chunks)
    starts = [chunk.char_start for chunk in chunks]
    assert starts == sorted(set(starts))
    assert all(one.char_stop < other.char_stop for one, other in pairwise(chunks))
    if not overlap:
        assert "".join(chunk.text for chunk in chunks) == text


def test_the_strongest_boundary_in_reach_is_cut_at():
    assert [chunk.text for chunk in chunks_of("recursive", "aa\n\nbb\ncc. Dd ee", 12)] == ["aa\n\n", "bb\ncc. Dd ee"]
    assert [chunk.text for chunk in chunks_of("recursive", "one two\nthree\nfour five", 14)] == [
        "one two\nthree\n",
        "four five",
    ]
    assert [chunk.text for chunk in chunks_of("recursive", "One is. Two is. Three is.", 18)] == [
        "One is. Two is. ",
        "Three is.",
    ]
    assert [chunk.text for chunk in chunks_of("token", "one two three four", 9)] == ["one two", " three", " four"]


@every_chunker
def test_prose_is_cut_as_with_counted_words(name, byte_tokenizer):
    text = "".join(
        f"In {1900 + n % 90}, the committee's {n}th report said that costs rose. Mr. Smith {'agreed ' * (n % 9)}.\n"
        + "\n" * (n % 7 == 0)
        for n in range(400)
    )
    counted = create_chunker(ChunkingConfig(name, 900), byte_tokenizer).chunk(Document.from_text(text))
    assert chunks_of(name, text, 900) == counted


def test_a_sentence_far_before_the_cap_is_found():
    text = "Short one. Long " + "long " * 150 + "end. Next."
    assert chunks_of("sentence", text, 700)[0].text == "Short one. "


def test_a_grapheme_cluster_is_cut_only_where_it_alone_is_over_the_cap():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert [chunk.text for chunk in chunks_of("token", family * 5, 11)] == [family * 2, family * 2, family]
    assert [len(chunk.text) for chunk in chunks_of("token", family, 3)] == [3, 2]


@every_chunker
def test_an_overlap_repeats_the_end_of_the_chunk_before(name):
    text = " ".join(f"Sentence {number} has six words." for number in range(60))
    for before, after in pairwise(chunks_of(name, text, 200, 60)):
        assert 30 <= before.char_stop - after.char_start <= 60


def test_no_word_is_counted(monkeypatch):
    def refuse(*_):
        raise AssertionError("words were counted")

    monkeypatch.setattr(WordCounter, "measure", refuse)
    for name in NAMES:
        assert len(chunks_of(name, "The cat sat on the mat. It was flat.\n\n" * 50, 100)) > 10


def test_a_length_prior_is_solved_for_all_the_same():
    config = ChunkingConfig("recursive", 100, length_prior=LengthPriorName.GAUSSIAN)
    document = Document.from_text("The cat sat on the mat. " * 50)
    check_chunks(document, create_chunker(config, CharacterTokenizer()).chunk(document), 100)


def test_the_fingerprint_changes_with_cap_overlap_and_kind():
    configs = [ChunkingConfig("token", 50), ChunkingConfig("token", 51), ChunkingConfig("token", 50, 5)]
    configs.append(ChunkingConfig("sentence", 50))
    assert len({create_chunker(config, CharacterTokenizer()).fingerprint for config in configs}) == 4


def test_the_tokens_are_the_code_points():
    tokenizer = CharacterTokenizer()
    assert isinstance(tokenizer, TextTokenizer)
    assert tokenizer.decode(tokenizer.encode("a\ud83d猫")) == "a\ud83d猫"
    assert tokenizer.count_batch(["", "ab"]) == [0, 2]
    assert tokenizer.offsets("ab") == [(0, 1), (1, 2)]
