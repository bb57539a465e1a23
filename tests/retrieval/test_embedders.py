from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ragkit.config import EmbeddingConfig, EncoderBackend
from ragkit.errors import ModelError, UsageError
from ragkit.retrieval.embedders import load_embedder
from ragkit.retrieval.encoder import BertEncoder
from ragkit.retrieval.sentence_transformer import SentenceTransformerEmbedder


def config(folder: Path, backend: EncoderBackend = EncoderBackend.AUTO) -> EmbeddingConfig:
    return EmbeddingConfig(model=str(folder), backend=backend)


def test_a_bert_folder_runs_in_the_thin_encoder(bert_folder: Path) -> None:
    embedder = load_embedder(config(bert_folder), device="cpu", offline=True)
    assert isinstance(embedder, BertEncoder)
    assert (embedder.backend, embedder.dim, embedder.max_tokens) == ("encoder-numpy", 32, 16)


def test_what_the_thin_encoder_cannot_run_goes_to_sentence_transformers_and_the_log_says_why(
    variant: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = variant(pooling="max")
    with caplog.at_level(logging.INFO, logger="ragkit"):
        embedder = load_embedder(config(folder), device="cpu", offline=True)
    assert isinstance(embedder, SentenceTransformerEmbedder)
    assert embedder.backend == "sentence-transformers"
    assert "runs through sentence-transformers: its pooling is max" in caplog.text


def test_the_thin_encoder_that_was_asked_for_is_never_replaced(variant: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"the thin encoder cannot run .*its pooling is max"):
        load_embedder(config(variant(pooling="max"), EncoderBackend.ENCODER), device="cpu", offline=True)


def test_sentence_transformers_can_be_asked_for(bert_folder: Path) -> None:
    embedder = load_embedder(config(bert_folder, EncoderBackend.SENTENCE_TRANSFORMERS), device="cpu", offline=True)
    assert isinstance(embedder, SentenceTransformerEmbedder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_usage_error(bert_folder: Path) -> None:
    with pytest.raises(UsageError, match="torch sees no GPU"):
        load_embedder(config(bert_folder), device="cuda", offline=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("modules.json", "{}", "does not list modules"), ("modules.json", "not json", r"cannot read .*modules\.json"),
     ("tokenizer.json", "{}", "cannot read the tokenizer")],
)  # fmt: skip
def test_a_damaged_folder_is_a_model_error(variant: Callable[..., Path], name: str, content: str, message: str) -> None:
    folder = variant()
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        load_embedder(config(folder), device="cpu", offline=True)
