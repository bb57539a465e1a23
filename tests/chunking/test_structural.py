"""Structure decides the cuts, and what a chunk's place says survives."""

from __future__ import annotations

import pytest

from ragkit.chunking.structural import StructuralOptions, structural_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import UsageError
from ragkit.types import Document

GUIDE = (
    "# Guide\n\nIntro text here.\n\n## Install\n\nRun the tool. Then wait.\n\n"
    "### Linux\n\nUse apt.\n\n## Use\n\nCall it.\n"
)
TABLE = "Sizes:\n\n| name | size |\n|---|---|\n" + "".join(f"| item{n} | {n} |\n" for n in range(30))


def chunks(tokenizer, text, cap=256, **options):
    chunker = structural_chunker(ChunkingConfig(max_tokens=cap), tokenizer, StructuralOptions(**options))
    return [chunk.text for chunk in chunker.chunk(Document.from_text(text))]


def test_headings_to_the_split_level_open_chunks(word_tokenizer):
    assert [text.split("\n")[0] for text in chunks(word_tokenizer, GUIDE)] == ["# Guide", "## Install", "## Use"]
    assert len(chunks(word_tokenizer, GUIDE, split_level=3)) == 4
    assert len(chunks(word_tokenizer, GUIDE, split_level=0)) == 1


def test_under_the_cap_higher_headings_are_cut_first(word_tokenizer):
    size = word_tokenizer.count_batch([GUIDE])[0]
    assert [text.split("\n")[0] for text in chunks(word_tokenizer, GUIDE, cap=size - 1, split_level=0)][1:] in (
        ["## Install"],
        ["## Use"],
    )


def test_html_headings_inside_a_line_open_chunks(word_tokenizer):
    text = "<h1>One</h1><p>Some text.</p><h2>Two</h2><p>More text.</p>"
    assert chunks(word_tokenizer, text) == ["<h1>One</h1><p>Some text.</p>", "<h2>Two</h2><p>More text.</p>"]


def test_a_heading_is_never_parted_from_its_text(word_tokenizer):
    text = "".join(f"## Heading {n}\n\nA sentence of some words stands here. And one more.\n\n" for n in range(9))
    for cap in range(16, 60, 4):
        assert not any(
            piece.rstrip().rsplit("\n", 1)[-1].startswith("##")
            for piece in chunks(word_tokenizer, text, cap, split_level=0)
        )


def test_a_table_is_cut_between_rows_and_its_header_stays_with_the_first(word_tokenizer):
    pieces = chunks(word_tokenizer, TABLE, cap=50)
    assert len(pieces) > 3
    assert all(piece.startswith("| item") for piece in pieces[1:])
    assert "| item0" in pieces[0]


def test_a_split_level_below_zero_is_refused():
    with pytest.raises(UsageError, match="at least 0, got -1"):
        StructuralOptions(split_level=-1)


def test_a_section_may_be_cut_behind_its_first_sentence(word_tokenizer):
    text = "# Title\n\nOne two three four. Five six. Seven eight nine ten.\n"
    chunker = structural_chunker(ChunkingConfig(max_tokens=13), word_tokenizer)
    chunks, signals = chunker.chunk_with_signals(Document.from_text(text))
    assert signals.values.tolist() == [-30.0, -30.0]
    assert len(chunks) == 2
    apart = "<h1>Title</h1>\n\nOne two three four. Five six.\n"
    assert chunker.chunk_with_signals(Document.from_text(apart))[1].values.tolist() == [-100.0, -30.0]
