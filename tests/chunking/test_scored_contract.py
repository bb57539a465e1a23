"""What every chunker with a model must hold, on text that nobody wishes for. A new one is a line in chunker_doubles."""

from __future__ import annotations

import numpy as np
import pytest
from chunker_doubles import SCORED_CHUNKERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragkit.chunking.base import check_chunks
from ragkit.chunking.signals import SignalChunker
from ragkit.config import ChunkingConfig
from ragkit.types import Document, PageSpan

FAMILY = "\U0001f468‍\U0001f469‍\U0001f467‍\U0001f466"
PIECES = st.sampled_from(
    [
        "cat ",
        "The ship sails. ",
        "Is it bread? ",
        "\n",
        "\n\n",
        "\r\n",
        "\r\n\r\n",
        " ",
        "\t",
        "\x00",
        "\x0c",
        "# Title\n\n",
        "- item\n",
        "Dr. No met e.g. U.S. agents. ",
        "これは文です。",
        "שלום עולם. ",
        FAMILY,
        "x" * 70,
        "Title\n=====\n",
        "| a | b |\n",
        "\u2028",
        "\ufeff",
        "\xa0",
        "\ud83d",
        "```\n",
        "<h1>",
        "1.2 Law\n",
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=50).map("".join), st.text(max_size=200))
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


every_chunker = pytest.mark.parametrize("name", sorted(SCORED_CHUNKERS))


@every_chunker
@PROPERTY
@given(
    text=TEXTS,
    double=st.sampled_from(["byte", "word", "surcharge", "pair"]),
    cap=st.integers(5, 80),
    overlap=st.integers(0, 4),
)
def test_chunks_keep_the_contract_on_any_text(name, doubles, text, double, cap, overlap):
    tokenizer = doubles[double]()
    document = Document.from_text(text)
    chunks = SCORED_CHUNKERS[name](ChunkingConfig(max_tokens=cap, overlap_tokens=overlap), tokenizer).chunk(document)
    check_chunks(document, chunks, cap)
    assert [chunk.token_count for chunk in chunks] == tokenizer.count_batch([chunk.text for chunk in chunks])
    starts = [chunk.char_start for chunk in chunks]
    assert starts == sorted(set(starts))
    if not overlap:
        assert "".join(chunk.text for chunk in chunks) == text


@every_chunker
@PROPERTY
@given(text=TEXTS, cap=st.integers(5, 80))
def test_signals_are_finite_and_say_where_the_text_was_cut(name, doubles, text, cap):
    document = Document.from_text(text)
    chunker = SCORED_CHUNKERS[name](ChunkingConfig(max_tokens=cap), doubles["byte"]())
    assert isinstance(chunker, SignalChunker)
    chunks, signals = chunker.chunk_with_signals(document)
    assert chunks == chunker.chunk(document)
    assert len(signals.offsets) == len(signals.values) == len(signals.cut)
    assert np.isfinite(signals.values).all()
    assert signals.measure
    offsets = signals.offsets.tolist()
    assert offsets == sorted(set(offsets) - {0, len(text)})
    assert set(signals.offsets[signals.cut].tolist()) <= {chunk.char_start for chunk in chunks[1:]}


@every_chunker
@PROPERTY
@given(text=TEXTS, other=TEXTS, cap=st.integers(5, 40))
def test_equal_documents_give_equal_chunks_whatever_was_chunked_before(name, doubles, text, other, cap):
    config = ChunkingConfig(max_tokens=cap)
    used = SCORED_CHUNKERS[name](config, doubles["byte"]())
    used.chunk(Document.from_text(other))
    fresh = SCORED_CHUNKERS[name](config, doubles["byte"]())
    assert fresh.chunk(Document.from_text(text)) == used.chunk(Document.from_text(text))


@every_chunker
def test_text_of_no_characters_gives_no_chunks(name, byte_tokenizer):
    assert SCORED_CHUNKERS[name](ChunkingConfig(), byte_tokenizer).chunk(Document.from_text("")) == []


@every_chunker
@pytest.mark.parametrize(
    "unit",
    ["The cat sat on the mat. It was flat.\n\n", "x", "word ", "\n", FAMILY, "これは文です。", "字", "a,b;", " \n"],
    ids=["prose", "one word", "no sentences", "blank lines", "emoji", "CJK", "CJK unbroken", "punctuation", "gaps"],
)
def test_a_character_is_tokenised_at_most_three_times_for_the_cap(name, byte_tokenizer, unit):
    text = unit * (20_000 // len(unit))
    SCORED_CHUNKERS[name](ChunkingConfig(), byte_tokenizer).chunk(Document.from_text(text))
    assert byte_tokenizer.characters <= 3 * len(text)


@every_chunker
def test_a_chunk_lies_on_the_page_of_its_first_character(name, byte_tokenizer):
    text = "".join(f"Page {number} says {number}. " for number in range(1, 10))
    size = len(text) // 9
    pages = [PageSpan(number + 1, number * size, (number + 1) * size) for number in range(9)]
    document = Document.from_text(text, pages=pages)
    chunks = SCORED_CHUNKERS[name](ChunkingConfig(max_tokens=30), byte_tokenizer).chunk(document)
    assert len(chunks) >= 5
    assert [chunk.page for chunk in chunks] == [chunk.char_start // size + 1 for chunk in chunks]


@every_chunker
def test_the_fingerprint_changes_with_cap_overlap_and_tokenizer(name, doubles):
    variants = [
        SCORED_CHUNKERS[name](ChunkingConfig(max_tokens=cap, overlap_tokens=overlap), doubles[double]()).fingerprint
        for cap, overlap, double in [(64, 0, "byte"), (65, 0, "byte"), (64, 1, "byte"), (64, 0, "word")]
    ]
    again = SCORED_CHUNKERS[name](ChunkingConfig(max_tokens=64), doubles["byte"]()).fingerprint
    assert len(set(variants)) == 4
    assert again == variants[0]
