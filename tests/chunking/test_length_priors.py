"""A length prior from the settings: every chunker weighs it against its boundaries, and the cap holds all the same."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_doubles import TopicEmbedder, topic_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragkit.chunking.base import check_chunks
from ragkit.chunking.configured_prior import configured_prior
from ragkit.chunking.length_constrained import (
    ClippedPolynomialPrior,
    GaussianPrior,
    LogNormalPrior,
    UniformPrior,
)
from ragkit.chunking.registry import CHUNKERS, create_chunker
from ragkit.chunking.signals import SignalChunker
from ragkit.config import ChunkingConfig, LengthPriorName
from ragkit.errors import ConfigError
from ragkit.types import Document

PRIORS = [name for name in LengthPriorName if name is not LengthPriorName.AUTO]
PULLING = [name for name in PRIORS if name is not LengthPriorName.UNIFORM]
PIECES = st.sampled_from(
    [
        "word ",
        "Is it? ",
        "\n",
        "\n\n",
        "\r\n",
        "\x00",
        "# Title\n\n",
        "- item\n",
        "これは文です。",
        "x" * 70,
        "e\u0301" * 9,
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=40).map("".join), st.text(max_size=200))
DOUBLES = st.sampled_from(["byte", "word", "surcharge", "pair"])
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PACKED = ("recursive", "sentence", "token")


class Models:
    embedder = TopicEmbedder()


def chunks_of(name, tokenizer, text, cap, prior=LengthPriorName.AUTO, **options):
    config = ChunkingConfig(name, cap, length_prior=prior, **options)
    return create_chunker(config, tokenizer, Models()).chunk(Document.from_text(text))


def sentences(count):
    return "".join(f"Sentence {number} has six words. " for number in range(count))


@pytest.mark.parametrize("name", sorted(CHUNKERS))
@PROPERTY
@given(
    text=TEXTS, double=DOUBLES, cap=st.integers(5, 80), overlap=st.integers(0, 4), prior=st.sampled_from(PRIORS),
    target=st.integers(0, 80), spread=st.just(0.0) | st.floats(0.01, 50),
)  # fmt: skip
def test_chunks_keep_the_contract_under_any_prior(name, doubles, text, double, cap, overlap, prior, target, spread):
    tokenizer = doubles[double]()
    document = Document.from_text(text)
    config = ChunkingConfig(name, cap, overlap, prior, min(target, cap), spread)
    chunks = create_chunker(config, tokenizer).chunk(document)
    check_chunks(document, chunks, cap)
    assert [chunk.token_count for chunk in chunks] == tokenizer.count_batch([chunk.text for chunk in chunks])


@pytest.mark.parametrize("prior", PULLING)
@pytest.mark.parametrize("name", [*PACKED, "balanced", "semantic", "cluster"])
def test_a_prior_pulls_the_chunks_of_every_chunker_towards_its_target(name, prior, word_tokenizer):
    spread = 0.1 if prior is LengthPriorName.LOG_NORMAL else 5.0
    text = sentences(200) if name in (*PACKED, "balanced") else topic_text(40)
    target = 35 if name != "cluster" else 50  # its pieces have up to 50 tokens
    chunks = chunks_of(name, word_tokenizer, text, 100, prior, length_target=target, length_spread=spread)
    counts = [chunk.token_count for chunk in chunks[:-1]]
    assert np.mean(counts) == pytest.approx(target, rel=0.15)


@pytest.mark.parametrize("name", PACKED)
def test_without_a_prior_a_chunk_is_filled_and_a_rest_is_left_with_one_there_is_none(name, word_tokenizer):
    text = sentences(17)
    greedy, even = (
        chunks_of(name, word_tokenizer, text, 100, prior) for prior in (LengthPriorName.AUTO, LengthPriorName.GAUSSIAN)
    )
    assert min(chunk.token_count for chunk in greedy) < 15
    assert min(chunk.token_count for chunk in even) > 40


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_a_paragraph_that_fits_is_not_cut_where_every_length_is_as_good(doubles, sizes):
    paragraphs = ["w" * size + "\n\n" for size in sizes]
    chunks = chunks_of("recursive", doubles["byte"](), "".join(paragraphs), 40, LengthPriorName.UNIFORM)
    inner = {chunk.char_start for chunk in chunks}
    at = 0
    for paragraph in paragraphs:
        assert len(paragraph) > 40 or not any(at < start < at + len(paragraph) for start in inner)
        at += len(paragraph)


def test_lines_are_cut_before_sentences_and_sentences_before_words(byte_tokenizer):
    def texts(text, cap):
        return [chunk.text for chunk in chunks_of("recursive", byte_tokenizer, text, cap, LengthPriorName.UNIFORM)]

    assert texts("One. Two\nThree. Four", 14) == ["One. Two\n", "Three. Four"]
    assert texts("One is. Two is. Three is.", 18) == ["One is. ", "Two is. Three is."]
    assert texts("one two three four", 9) == ["one two", " three", " four"]


def test_the_fewest_chunks_are_made_where_every_length_is_as_good(word_tokenizer):
    text = "".join(f"{'word ' * size}.\n\n" for size in (40, 50, 70, 30, 60, 40))
    chunks = chunks_of("recursive", word_tokenizer, text, 110, LengthPriorName.UNIFORM)
    assert [chunk.token_count // 10 for chunk in chunks] == [9, 10, 10]


def test_solved_chunkers_show_what_they_went_by(word_tokenizer):
    config = ChunkingConfig("recursive", 40, length_prior=LengthPriorName.GAUSSIAN)
    chunker = create_chunker(config, word_tokenizer)
    assert isinstance(chunker, SignalChunker)
    _, signals = chunker.chunk_with_signals(Document.from_text("One two. Three four.\nFive six.\n\nSeven."))
    assert signals.values.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("name", [*PACKED, "balanced", "semantic", "cluster"])
def test_the_fingerprint_changes_with_prior_target_and_spread(name, word_tokenizer):
    told = [(LengthPriorName.AUTO, 0, 0.0), *((prior, 0, 0.0) for prior in PRIORS)]
    told += [(LengthPriorName.GAUSSIAN, 50, 0.0), (LengthPriorName.GAUSSIAN, 50, 3.0)]
    found = {create_chunker(ChunkingConfig(name, 100, 0, *some), word_tokenizer, Models()).fingerprint for some in told}
    # semantic takes the uniform prior and balanced the log-normal one anyway
    assert len(found) == len(told) - (name in ("semantic", "balanced"))


def test_a_prior_left_to_itself_aims_at_two_thirds_of_the_room():
    made = [configured_prior(ChunkingConfig("token", 200, 50, name)) for name in LengthPriorName]
    assert made == [
        None,
        UniformPrior(),
        GaussianPrior(100.0, 100.0 * (1 / 3)),
        LogNormalPrior(100.0, 0.5),
        ClippedPolynomialPrior(100.0, 75.0),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_target": 300}, r"chunking\.length_target must be at most chunking\.max_tokens = 256"),
        ({"length_target": -1}, r"chunking\.length_target must"),
        ({"length_spread": float("inf")}, r"chunking\.length_spread must be 0 or a number from 0\.01, got inf"),
        ({"length_spread": -1.0}, r"chunking\.length_spread must be"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ChunkingConfig(**options)
