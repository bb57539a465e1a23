"""The head computes what its formula says, fits one embedder, and its file holds plain tensors."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_doubles import BrokenEmbedder, TopicEmbedder, topic_text
from safetensors.numpy import save_file

from ragkit.chunking.boundary_head import (
    SHIPPED_HEAD,
    BoundaryHead,
    BoundaryHeadOptions,
    boundary_head_chunker,
    load_boundary_head,
    save_boundary_head,
)
from ragkit.config import ChunkingConfig
from ragkit.errors import ChunkingError, ModelError, UsageError
from ragkit.types import Document


def random_head(dim=6, hidden=5, embedder_id="topics@1"):
    draw = np.random.default_rng(0).normal
    return BoundaryHead(
        draw(size=(hidden, 4 * dim)).astype(np.float32),
        draw(size=hidden).astype(np.float32),
        draw(size=hidden).astype(np.float32),
        0.25,
        embedder_id,
    )


def product_head():
    """The log-odds are 8 (x1 . x2) - 4: the four products are summed by four hidden units."""
    weight = np.zeros((4, 16), np.float32)
    weight[:, 12:] = 8 * np.eye(4)
    return BoundaryHead(weight, np.zeros(4, np.float32), np.ones(4, np.float32), -4.0, "topics@1")


def test_the_odds_are_those_of_the_perceptron_on_the_four_parts():
    head = random_head()
    one, two = np.random.default_rng(1).normal(size=(2, 7, 6)).astype(np.float32)
    features = np.concatenate([one, two, one - two, one * two], axis=1)
    expected = np.maximum(features @ head.hidden_weight.T + head.hidden_bias, 0) @ head.output_weight + 0.25
    assert head.log_odds_together(one, two) == pytest.approx(expected, abs=1e-4)


def test_the_text_is_cut_where_the_head_sees_two_paragraphs(word_tokenizer):
    text = topic_text()
    chunker = boundary_head_chunker(ChunkingConfig(), word_tokenizer, TopicEmbedder(), product_head())
    starts = [chunk.char_start for chunk in chunker.chunk(Document.from_text(text))]
    assert starts == [0, text.index("The ship"), text.index("The bread")]


def test_boundaries_below_the_threshold_are_cut_and_no_others(word_tokenizer):
    document = Document.from_text(topic_text(300))
    for threshold in (0.2, 0.55, 0.9):
        options = BoundaryHeadOptions(threshold)
        chunker = boundary_head_chunker(
            ChunkingConfig(max_tokens=100_000), word_tokenizer, TopicEmbedder(), product_head(), options
        )
        _, signals = chunker.chunk_with_signals(document)
        assert (signals.cut == (signals.values < threshold)).all()
        assert len(signals.cut) == 899


def test_every_sentence_is_embedded_once(word_tokenizer):
    embedder = TopicEmbedder()
    text = topic_text(400)
    boundary_head_chunker(ChunkingConfig(), word_tokenizer, embedder, product_head()).chunk(Document.from_text(text))
    assert "".join(embedder.asked) == text


def test_a_head_that_was_saved_is_the_same_within_half_precision(tmp_path):
    head = random_head()
    save_boundary_head(head, tmp_path / "head.safetensors", "a recipe")
    loaded = load_boundary_head(tmp_path / "head.safetensors")
    one, two = np.random.default_rng(1).normal(size=(2, 7, 6)).astype(np.float32)
    assert loaded.log_odds_together(one, two) == pytest.approx(head.log_odds_together(one, two), abs=0.05)
    assert loaded.embedder_id == "topics@1"
    assert loaded.fingerprint == load_boundary_head(tmp_path / "head.safetensors").fingerprint


@pytest.mark.models
def test_the_shipped_head_fits_the_bundled_embedder():
    from ragkit.config import EmbeddingConfig
    from ragkit.retrieval.embedders import load_embedder

    head = load_boundary_head()
    embedder = load_embedder(EmbeddingConfig(), offline=True)
    assert (head.dim, head.embedder_id) == (embedder.dim, embedder.embedder_id)
    assert SHIPPED_HEAD.stat().st_size < 500_000


def test_a_head_for_another_embedder_is_refused(word_tokenizer):
    with pytest.raises(UsageError, match="trained on the embedder other@1, got topics@1"):
        boundary_head_chunker(ChunkingConfig(), word_tokenizer, TopicEmbedder(), random_head(4, embedder_id="other@1"))


def test_an_embedder_that_returns_nan_is_an_error(word_tokenizer):
    chunker = boundary_head_chunker(ChunkingConfig(), word_tokenizer, BrokenEmbedder(), product_head())
    with pytest.raises(ChunkingError, match="not finite"):
        chunker.chunk(Document.from_text("The cat purrs. Some poison here. The end."))


def test_a_file_that_is_no_head_is_refused(tmp_path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(ModelError, match="no boundary head that can be read"):
        load_boundary_head(path)
    path.write_bytes(b"\0" * 40)
    with pytest.raises(ModelError, match="no boundary head that can be read"):
        load_boundary_head(path)
    tensors = {name: np.zeros((2, 3), np.float16) for name in ("hidden.weight", "hidden.bias", "output.weight")}
    save_file({**tensors, "output.bias": np.zeros(1, np.float16)}, path)
    with pytest.raises(ModelError, match="its tensors have the shapes"):
        load_boundary_head(path)


def test_a_threshold_of_one_is_refused():
    with pytest.raises(UsageError, match="between 0 and 1, got 1"):
        BoundaryHeadOptions(threshold=1)
