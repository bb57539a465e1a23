"""Chunkers that run models get them, and only the models that they need."""

from __future__ import annotations

import pytest
from embedding_doubles import TopicEmbedder, topic_text

from ragkit.chunking.base import check_chunks
from ragkit.chunking.registry import CHUNKERS, MODEL_CHUNKERS, create_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import UsageError
from ragkit.types import Document


class EmbedderAlone:
    """Models of which only the embedder may be asked for."""

    embedder = TopicEmbedder()

    @property
    def engine(self):
        raise AssertionError("the generator was loaded for nothing")


def test_the_names_are_those_of_the_chunkers(word_tokenizer):
    assert not set(CHUNKERS) & set(MODEL_CHUNKERS)
    for name in CHUNKERS:
        assert create_chunker(ChunkingConfig(name), word_tokenizer).name == name
    for name in ("semantic", "cluster"):
        assert create_chunker(ChunkingConfig(name), word_tokenizer, EmbedderAlone()).name == name


@pytest.mark.parametrize("name", ["semantic", "cluster"])
def test_a_chunker_with_an_embedder_keeps_the_contract(word_tokenizer, name):
    document = Document.from_text(topic_text())
    config = ChunkingConfig(name, max_tokens=60)
    check_chunks(document, create_chunker(config, word_tokenizer, EmbedderAlone()).chunk(document), 60)


def test_the_shipped_head_refuses_another_embedder(word_tokenizer):
    with pytest.raises(UsageError, match=r"the boundary head was trained on the embedder bert-384@.*, got topics@1"):
        create_chunker(ChunkingConfig("boundary_head"), word_tokenizer, EmbedderAlone())


@pytest.mark.parametrize("name", sorted(MODEL_CHUNKERS))
def test_a_chunker_that_runs_a_model_says_so_where_there_is_none(word_tokenizer, name):
    with pytest.raises(UsageError, match=f"the chunker '{name}' runs a model, and none was given"):
        create_chunker(ChunkingConfig(name), word_tokenizer)
