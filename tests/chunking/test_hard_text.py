"""Text that has no good place to cut, and text that has no good size."""

from __future__ import annotations

import logging
import tracemalloc
from itertools import accumulate

import pytest

from ragkit.chunking.base import check_chunks
from ragkit.chunking.boundaries import Boundary
from ragkit.chunking.packed import PackedChunker
from ragkit.chunking.registry import create_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import ChunkingError, ConfigError
from ragkit.types import Document

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"  # 25 bytes
FLAG = "\U0001f1e9\U0001f1ea"
ACCENTED = "e\u0301\u0323"


def chunk(tokenizer, text, cap, name="recursive"):
    chunks = create_chunker(ChunkingConfig(name, cap), tokenizer).chunk(Document.from_text(text))
    check_chunks(Document.from_text(text), chunks, cap)
    return [chunk.text for chunk in chunks]


@pytest.mark.parametrize(
    "grapheme", [FAMILY, FLAG, ACCENTED, "\U0001f44d\U0001f3fd", "\u1100\u1161\u11a8", "\r\n", "\ud83d\ude00"]
)
@pytest.mark.parametrize("cap", [26, 60, 256])
def test_no_cut_falls_inside_what_a_reader_sees_as_one_character(byte_tokenizer, grapheme, cap):
    chunks = chunk(byte_tokenizer, grapheme * 300, cap)
    assert len(chunks) > 1
    assert all(len(piece) % len(grapheme) == 0 for piece in chunks)


def test_one_endless_line_fills_the_chunks(byte_tokenizer):
    chunks = chunk(byte_tokenizer, "x" * 10_000, 256)
    assert [len(piece) for piece in chunks[:-1]] == [256] * 39


def test_a_character_over_the_cap_is_cut_by_code_points_and_logged(byte_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        chunks = chunk(byte_tokenizer, "ab " + FAMILY + " " + FAMILY + " cd", 8)
    assert "".join(chunks) == "ab " + FAMILY + " " + FAMILY + " cd"
    assert caplog.messages == ["memory:: 2 characters have more than 8 tokens and were cut inside, the first at 3"]


def test_a_code_point_over_the_cap_is_an_error_that_names_the_cap_it_needs(byte_tokenizer):
    with pytest.raises(ChunkingError, match=r"'😀' at 3 alone has 4 tokens, the cap is 3; raise .* to at least 4"):
        chunk(byte_tokenizer, "abc😀", 3)


def test_nul_and_control_characters_are_text(byte_tokenizer):
    assert chunk(byte_tokenizer, "a\x00b\x01 \x7f c", 100) == ["a\x00b\x01 \x7f c"]


def test_crlf_stays_together(byte_tokenizer):
    chunks = chunk(byte_tokenizer, "\r\n" * 100 + "line\r\n" * 100, 7)
    assert not any(piece.startswith("\n") for piece in chunks)


def test_right_to_left_text_is_cut_between_words(byte_tokenizer):
    chunks = chunk(byte_tokenizer, "שלום עולם " * 40, 60)
    assert all(piece.strip() in ("שלום עולם " * 3).strip() for piece in chunks)


@pytest.mark.parametrize("tokens", ["surcharge", "pair"])
def test_a_count_that_words_do_not_add_up_to_still_keeps_the_cap(doubles, tokens):
    tokenizer = doubles[tokens]()
    text = "Some words stand here, and some more follow them. " * 200
    chunks = chunk(tokenizer, text, 100)
    counts = tokenizer.count_batch(chunks)
    assert max(counts) <= 100
    assert sum(counts) / len(counts) >= 45


@pytest.mark.parametrize("overlap", [0, 20])
def test_windows_change_no_chunk(word_tokenizer, overlap):
    text = "".join(f"Paragraph {n} has a line.\nAnd, by Dr. No, more of {n}.\n\n# Title {n}\n\n" for n in range(800))
    document = Document.from_text(text)
    kinds = [Boundary.PARAGRAPH, Boundary.LINE, Boundary.SENTENCE, Boundary.WORD]
    whole = PackedChunker("recursive", kinds, word_tokenizer, 50, overlap, window=1 << 20).chunk(document)
    windowed = PackedChunker("recursive", kinds, word_tokenizer, 50, overlap, window=1500).chunk(document)
    assert len(whole) > 100
    assert windowed == whole


def test_a_cap_wider_than_the_window_is_kept(byte_tokenizer):
    chunker = PackedChunker("token", [Boundary.WORD], byte_tokenizer, 5000, window=600)
    sizes = [len(chunk.text) for chunk in chunker.chunk(Document.from_text("word " * 4000))]
    assert max(sizes) == 5000
    assert list(accumulate(sizes))[-1] == 20_000


def test_memory_does_not_grow_with_the_text(byte_tokenizer):
    kinds = [Boundary.PARAGRAPH, Boundary.LINE, Boundary.SENTENCE, Boundary.WORD]
    chunker = PackedChunker("recursive", kinds, byte_tokenizer, 256, window=1 << 15)

    def peak(size):
        document = Document.from_text("The cat sat on the mat. It was flat.\n\n" * (size // 38))
        tracemalloc.start()
        for _ in chunker.iter_chunks(document):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(200_000) < 1.3 * peak(70_000)


def test_an_unknown_chunker_names_the_nearest(byte_tokenizer):
    with pytest.raises(ConfigError, match=r"'recursiv' does not exist; did you mean 'recursive'\?"):
        create_chunker(ChunkingConfig("recursiv"), byte_tokenizer)
