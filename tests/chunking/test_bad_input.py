"""Text and models that nobody wishes for: a correct result or a clear error, never lost text, for every chunker."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from chunker_doubles import SCORED_CHUNKERS, random_head
from embedding_doubles import BrokenEmbedder
from loss_doubles import CodePointTokenizer, TableLosses

from ragkit.chunking.base import check_chunks
from ragkit.chunking.boundary_head import boundary_head_chunker
from ragkit.chunking.characters import CharacterTokenizer
from ragkit.chunking.cluster import ClusterChunker
from ragkit.chunking.perplexity import PerplexityOptions, PerplexityScorer, perplexity_chunker
from ragkit.chunking.registry import CHUNKERS, MODEL_CHUNKERS, create_chunker
from ragkit.chunking.semantic import semantic_chunker
from ragkit.chunking.topic import topic_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import ChunkingError
from ragkit.types import Document

WITHOUT_MODELS = {
    name: lambda config, tokenizer, name=name: create_chunker(
        ChunkingConfig(name, config.max_tokens, config.overlap_tokens), tokenizer
    )
    for name in CHUNKERS
}
EVERY = {**SCORED_CHUNKERS, **WITHOUT_MODELS}
every_chunker = pytest.mark.parametrize("name", sorted(EVERY))

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
UNITS = {
    "one endless line": "the cat sat on a mat and ",
    "no spaces": "x",
    "only emoji": FAMILY + "\U0001f600\U0001f44d\U0001f3fd",
    "right to left": "שלום עולם. مرحبا بالعالم؟ ",
    "CRLF": "A line of text\r\nand one more.\r\n\r\n",
    "NUL": "a\x00b\x00. \x00\n",
    "only NUL": "\x00",
    "blank lines": "\n",
    "full stops": ".",
    "hashes": "# ",
    "table edges": "|",
    "open brackets": "<h1>(",
    "prose": "The cat sat on the mat. Is it bread? The ship sails.\n\n",
}


def text_of(kind, size):
    unit = UNITS[kind]
    return unit * (size // len(unit))


def checked(name, text, cap=60, tokenizer=None):
    document = Document.from_text(text)
    chunks = EVERY[name](ChunkingConfig(max_tokens=cap), tokenizer or CodePointTokenizer()).chunk(document)
    check_chunks(document, chunks, cap)
    assert sum(len(chunk.text) for chunk in chunks) == len(text)
    return chunks


def test_no_registered_chunker_is_left_out():
    assert {name.partition("-")[0] for name in EVERY} == {*CHUNKERS, *MODEL_CHUNKERS}


@every_chunker
@pytest.mark.parametrize("kind", sorted(UNITS))
def test_hostile_text_is_cut_under_the_cap_and_kept_whole(name, kind):
    text = text_of(kind, 3_000)
    assert len(checked(name, text)) >= len(text) // 60


@every_chunker
@pytest.mark.parametrize("text", ["", " ", "\n", "\x00", "a", FAMILY, "\r\n", ".", "\ufeff"])
def test_text_of_one_character_or_none_is_one_chunk_or_none(name, text):
    assert len(checked(name, text)) == bool(text)


def calls_for(name, text):
    """Return how often functions are called while `text` is chunked: work that no clock on a busy machine blurs."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        checked(name, text)
    finally:
        sys.setprofile(None)
    return count


@every_chunker
@pytest.mark.parametrize("kind", ["one endless line", "no spaces", "only emoji", "blank lines", "prose"])
def test_work_at_most_doubles_with_the_text(name, kind):
    checked(name, text_of(kind, 2_000))  # what is done once
    assert calls_for(name, text_of(kind, 12_000)) <= 2.3 * calls_for(name, text_of(kind, 6_000)) + 500


@pytest.mark.slow
@every_chunker
@pytest.mark.parametrize("kind", ["one endless line", "no spaces", "only emoji"])
def test_a_megabyte_without_a_place_to_cut_is_kept_whole(name, kind):
    assert len(checked(name, text_of(kind, 1_000_000), cap=256)) >= 3_900


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WITHOUT_MODELS))
@pytest.mark.parametrize("tokenizer", [CodePointTokenizer(), CharacterTokenizer()], ids=["tokens", "characters"])
@pytest.mark.parametrize("kind", ["prose", "no spaces"])
def test_fifty_megabytes_are_kept_whole(name, tokenizer, kind):
    assert len(checked(name, text_of(kind, 50_000_000), cap=800, tokenizer=tokenizer)) >= 62_000


@pytest.mark.parametrize(
    "make",
    [
        semantic_chunker,
        ClusterChunker,
        lambda config, tokenizer, embedder: boundary_head_chunker(config, tokenizer, embedder, random_head()),
        lambda config, tokenizer, embedder: topic_chunker(config, tokenizer, embedder, random_head()),
    ],
    ids=["semantic", "cluster", "boundary_head", "topic"],
)
def test_an_embedder_that_returns_nan_is_named_with_the_text_and_what_to_do(make):
    chunker = make(ChunkingConfig(max_tokens=60), CodePointTokenizer(), BrokenEmbedder())
    advice = r"topics@1 returned a vector .* for the sentence '.*poison.*'; use another embedder or a chunker without"
    with pytest.raises(ChunkingError, match=advice):
        chunker.chunk(Document.from_text("The cat purrs.\n\nThe poison is here.\n\nThe end of it all.\n\n" * 3))


def test_a_language_model_that_gives_nan_is_an_error_that_says_what_to_do():
    class Broken(TableLosses):
        def token_losses(self, texts):
            return [np.full(len(ids) - 1, np.nan, np.float32) for ids in texts]

    own = CodePointTokenizer()
    scorer = PerplexityScorer(Broken(own, ["c"]), own, "broken@1", PerplexityOptions())
    chunker = perplexity_chunker(ChunkingConfig(max_tokens=60), own, scorer)
    with pytest.raises(ChunkingError, match="not finite for token 1; run it in float32 or bfloat16"):
        chunker.chunk(Document.from_text("The cat purrs. The end."))
