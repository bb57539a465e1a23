"""What every chunker of the registry must hold, on text that nobody wishes for. A new chunker is tested by its name."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ragkit.chunking.base import check_chunks
from ragkit.chunking.registry import CHUNKERS, create_chunker
from ragkit.config import ChunkingConfig
from ragkit.types import Document, PageSpan

FAMILY = "\U0001f468‍\U0001f469‍\U0001f467‍\U0001f466"
ZALGO = "e" + "\u0301" * 12
PIECES = st.sampled_from(
    [
        *("word ", "Sentence one. ", "Is it? ", "\n", "\n\n", "\r\n", "\r\n\r\n", " ", "\t", "\x00", "\x0c"),
        *("# Title\n\n", "- item\n", "Title\n=====\n", "| a | b |\n", "Dr. No met e.g. U.S. agents. "),
        *(
            "これは文です。",
            "שלום עולם. ",
            "مرحبا؟ ",
            FAMILY,
            ZALGO,
            "\U0001f1e9\U0001f1ea",
            "\u2028",
            "\ufeff",
            "\u00a0",
        ),
        *("x" * 70, "https://example.org/a/b?c=d&e=f#g"),
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=60).map("".join), st.text(max_size=300))
DOUBLES = st.sampled_from(["byte", "word", "surcharge", "pair"])
PROPERTY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

every_chunker = pytest.mark.parametrize("name", sorted(CHUNKERS))


@every_chunker
@PROPERTY
@given(text=TEXTS, double=DOUBLES, cap=st.integers(5, 80), overlap=st.integers(0, 4))
@example(text="a" * 500, double="byte", cap=7, overlap=3)
@example(text=FAMILY * 30, double="byte", cap=9, overlap=2)
@example(text="\n" * 300, double="surcharge", cap=20, overlap=4)
@example(text="Dr. No met e.g. U.S. agents. \n\x0cword ", double="pair", cap=5, overlap=1)
def test_chunks_keep_the_contract_on_any_text(name, doubles, text, double, cap, overlap):
    tokenizer = doubles[double]()
    document = Document.from_text(text)
    chunks = create_chunker(ChunkingConfig(name, cap, overlap), tokenizer).chunk(document)
    check_chunks(document, chunks, cap)
    assert [chunk.token_count for chunk in chunks] == tokenizer.count_batch([chunk.text for chunk in chunks])
    starts = [chunk.char_start for chunk in chunks]
    assert starts == sorted(set(starts))
    assert len({chunk.chunk_id for chunk in chunks}) == len(chunks)


@every_chunker
@PROPERTY
@given(text=TEXTS, cap=st.integers(5, 80))
def test_without_overlap_the_chunks_joined_are_the_text(name, doubles, text, cap):
    chunks = create_chunker(ChunkingConfig(name, cap), doubles["word"]()).chunk(Document.from_text(text))
    assert "".join(chunk.text for chunk in chunks) == text


@every_chunker
@PROPERTY
@given(text=TEXTS, other=TEXTS, cap=st.integers(5, 40))
def test_equal_documents_give_equal_chunks_whatever_was_chunked_before(name, doubles, text, other, cap):
    config = ChunkingConfig(name, cap)
    fresh = create_chunker(config, doubles["byte"]())
    used = create_chunker(config, doubles["byte"]())
    used.chunk(Document.from_text(other))
    assert fresh.chunk(Document.from_text(text)) == used.chunk(Document.from_text(text))


@every_chunker
def test_text_of_no_characters_gives_no_chunks(name, byte_tokenizer):
    assert create_chunker(ChunkingConfig(name), byte_tokenizer).chunk(Document.from_text("")) == []


@every_chunker
def test_text_under_the_cap_is_one_chunk(name, byte_tokenizer):
    text = "# Title\n\nOne. Two.\n\nThree."
    chunks = create_chunker(ChunkingConfig(name), byte_tokenizer).chunk(Document.from_text(text))
    assert [chunk.text for chunk in chunks] == [text]


@every_chunker
@pytest.mark.parametrize(
    "unit",
    ["The cat sat on the mat. It was flat.\n\n", "x", "word ", "\n", FAMILY, "これは文です。", "字", "a,b;", " \n"],
    ids=["prose", "one word", "no sentences", "blank lines", "emoji", "CJK", "CJK unbroken", "punctuation", "gaps"],
)
def test_a_character_is_tokenised_at_most_three_times(name, byte_tokenizer, unit):
    text = unit * (40_000 // len(unit))
    create_chunker(ChunkingConfig(name), byte_tokenizer).chunk(Document.from_text(text))
    assert byte_tokenizer.characters <= 3 * len(text)


@every_chunker
def test_a_chunk_lies_on_the_page_of_its_first_character(name, byte_tokenizer):
    text = "".join(f"Page {number} says {number}. " for number in range(1, 10))
    size = len(text) // 9
    pages = [PageSpan(number + 1, number * size, (number + 1) * size) for number in range(9)]
    document = Document.from_text(text, pages=pages)
    chunks = create_chunker(ChunkingConfig(name, 30), byte_tokenizer).chunk(document)
    assert len(chunks) >= 5
    assert [chunk.page for chunk in chunks] == [chunk.char_start // size + 1 for chunk in chunks]


@every_chunker
def test_the_fingerprint_changes_with_cap_overlap_and_tokenizer(name, doubles):
    variants = [
        create_chunker(ChunkingConfig(name, cap, overlap), doubles[double]()).fingerprint
        for cap, overlap, double in [(64, 0, "byte"), (65, 0, "byte"), (64, 1, "byte"), (64, 0, "word")]
    ]
    again = create_chunker(ChunkingConfig(name, 64, 0), doubles["byte"]()).fingerprint
    assert len(set(variants)) == 4
    assert again == variants[0]


@every_chunker
@pytest.mark.models
@settings(PROPERTY, max_examples=25)
@given(text=TEXTS, cap=st.integers(8, 80), overlap=st.integers(0, 7))
def test_the_bundled_tokenizer_keeps_the_contract(name, bundled_tokenizer, text, cap, overlap):
    text = "".join(char for char in text if not 0xD800 <= ord(char) < 0xE000)
    document = Document.from_text(text)
    chunks = create_chunker(ChunkingConfig(name, cap, overlap), bundled_tokenizer).chunk(document)
    check_chunks(document, chunks, cap)
    assert [chunk.token_count for chunk in chunks] == bundled_tokenizer.count_batch([chunk.text for chunk in chunks])
