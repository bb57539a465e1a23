"""The thin encoder against sentence-transformers, on a tiny random BERT and on the bundled model."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ragkit.errors import ModelError, OfflineError, RetrievalError
from ragkit.models import resolve
from ragkit.retrieval.bert_numpy import NumpyBert
from ragkit.retrieval.bert_torch import TorchBert, onednn_works
from ragkit.retrieval.encoder import BertEncoder
from ragkit.retrieval.model_folder import read_model_folder
from ragkit.retrieval.sentence_transformer import SentenceTransformerEmbedder

TEXTS = [
    "the cat sat", "", "  \n ", "The CAT sat on the mat. A dog ran far!", "éclair 猫 ß İ 𝔘nicode \u200b e\u0301",
    "a", "cats ranning far far", "zzzz qqqq", "the " * 13, "the " * 14, "the " * 15, "cat dog " * 40,
]  # fmt: skip


def encoder(folder: Path, batch_tokens: int = 8192) -> BertEncoder:
    return BertEncoder(read_model_folder(folder), batch_tokens=batch_tokens)


def through(encoder: BertEncoder, forward: object) -> BertEncoder:
    encoder._forward_for = lambda tokens: forward  # type: ignore[method-assign, assignment, return-value]
    return encoder


@pytest.mark.parametrize(
    ("pooling", "normalise", "activation"),
    [("mean", True, "gelu"), ("cls", True, "gelu"), ("mean_sqrt_len_tokens", False, "relu")],
)
def test_every_forward_gives_the_vectors_of_sentence_transformers(
    variant: Callable[..., Path], pooling: str, normalise: bool, activation: str
) -> None:
    folder = variant(pooling=pooling, normalise=normalise, config={"hidden_act": activation})
    expected = SentenceTransformerEmbedder(read_model_folder(folder)).encode(TEXTS)
    weights = encoder(folder)._weights
    for forward in (NumpyBert(weights), TorchBert(weights, "cpu")):
        got = through(encoder(folder), forward).encode(TEXTS)
        assert np.abs(got - expected).max() < 1e-5, forward.name


def test_plain_torch_products_give_the_same_vectors(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encoder(bert_folder).encode(TEXTS)
    monkeypatch.setattr("ragkit.retrieval.bert_torch.onednn_works", lambda: False)
    plain = TorchBert(encoder(bert_folder)._weights, "cpu")
    assert plain.name == "torch-cpu"
    assert np.abs(through(encoder(bert_folder), plain).encode(TEXTS) - expected).max() < 1e-5


def test_onednn_products_work_with_the_pinned_torch() -> None:
    assert onednn_works()


def test_texts_within_the_window_equal_plain_sentence_transformers(bert_folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(bert_folder), device="cpu")
    short = [text for text in TEXTS if len(model.tokenizer(text)["input_ids"]) <= 16]
    assert len(short) >= 8
    assert np.abs(encoder(bert_folder).encode(short) - model.encode(short)).max() < 1e-5


def test_a_long_text_is_pooled_from_windows_weighted_by_their_tokens(bert_folder: Path) -> None:
    embedder = encoder(bert_folder)
    first, second = embedder.encode(["the cat sat on " * 3 + "mat", "dog ran far a " * 3])
    whole = embedder.encode(["the cat sat on " * 3 + "mat " + "dog ran far a " * 3])[0]
    pooled = 14 * first + 12 * second  # "on" is two pieces: 15 + 1 tokens would not fit, so windows are 14 and 14
    assert np.linalg.norm(whole) == pytest.approx(1, abs=1e-6)
    assert float(whole @ pooled) / np.linalg.norm(pooled) > 0.9


def test_the_end_of_a_long_text_counts(bert_folder: Path) -> None:
    one, other = encoder(bert_folder).encode(["the cat " * 100 + "dog", "the cat " * 100 + "far"])
    assert np.abs(one - other).max() > 1e-4


def test_no_forward_sees_more_tokens_than_the_window(bert_folder: Path) -> None:
    seen: list[int] = []
    inner = NumpyBert(encoder(bert_folder)._weights)

    class Spy:
        name = "spy"

        def pooled(self, token_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
            seen.extend(lengths.tolist())
            return inner.pooled(token_ids, lengths)

    through(encoder(bert_folder), Spy()).encode(["x" * 300, "cat dog " * 90, "a"])
    assert max(seen) == 16
    assert sum(seen) - 2 * len(seen) == 1 + 180 + 1  # one unknown word, 180 words, one letter: nothing is lost


def test_vectors_do_not_depend_on_the_batch(bert_folder: Path) -> None:
    together = encoder(bert_folder).encode(TEXTS)
    alone = np.concatenate([encoder(bert_folder, batch_tokens=1).encode([text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-6


def test_rows_are_finite_and_of_unit_length_and_no_texts_give_no_rows(bert_folder: Path) -> None:
    vectors = encoder(bert_folder).encode(TEXTS)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert encoder(bert_folder).encode([]).shape == (0, 32)


def test_progress_hears_every_token_once(bert_folder: Path) -> None:
    heard: list[int] = []
    encoder(bert_folder, batch_tokens=40).encode(["the cat"] * 50 + ["the " * 20], heard.append)
    assert len(heard) > 3
    assert sum(heard) == 50 * 4 + 20 + 2 * 2


def test_damaged_weights_are_an_error_not_a_vector(variant: Callable[..., Path]) -> None:
    folder = variant()
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RetrievalError, match=r"text 0 of 1; its weights are damaged"):
        encoder(folder).encode(["cat"])


def test_weights_of_another_shape_are_refused(variant: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"layer 0: up has shape \(48, 32\), its config.json says \(64, 32\)"):
        encoder(variant(config={"intermediate_size": 64}))


def test_a_window_beyond_the_positions_is_refused(variant: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="its window of 64 tokens exceeds its 32 positions"):
        encoder(variant(sentence_bert_config={"max_seq_length": 64}))


def test_query_and_document_prompts_are_used(variant: Callable[..., Path]) -> None:
    prompted = encoder(variant(config_sentence_transformers={"prompts": {"query": "dog ", "passage": "cat "}}))
    plain = encoder(variant("plain"))
    assert np.array_equal(prompted.encode_queries(["ran"]), plain.encode(["dog ran"]))
    assert np.array_equal(prompted.encode(["ran"]), plain.encode(["cat ran"]))


def test_identity_is_the_content_not_the_place_or_the_backend(variant: Callable[..., Path], bert_folder: Path) -> None:
    ours, copy = encoder(bert_folder).embedder_id, encoder(variant("elsewhere")).embedder_id
    assert ours == copy == SentenceTransformerEmbedder(read_model_folder(bert_folder)).embedder_id
    changed = [
        variant("cls", pooling="cls"),
        variant("raw", normalise=False),
        variant("short", sentence_bert_config={"max_seq_length": 12}),
        variant("prompt", config_sentence_transformers={"prompts": {"query": "q: "}}),
    ]
    other = shutil.copytree(bert_folder, changed[0].parent / "weights")
    tensors = load_file(other / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] += 1e-3
    save_file(tensors, other / "model.safetensors")
    identities = {encoder(folder).embedder_id for folder in (*changed, other)} | {ours}
    assert len(identities) == 6


def test_a_question_imports_neither_torch_nor_sentence_transformers(bert_folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from ragkit.config import EmbeddingConfig; from ragkit.retrieval.embedders import load_embedder\n"
        f"embedder = load_embedder(EmbeddingConfig(model={str(bert_folder)!r}), device='cpu')\n"
        "embedder.encode_queries(['the cat']); print(embedder.backend, 'torch' in sys.modules, 'scipy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["encoder-numpy", "False", "False"]


@pytest.mark.models
def test_the_bundled_model_gives_the_vectors_of_sentence_transformers() -> None:
    try:
        folder = read_model_folder(resolve("all-minilm-l6-v2", offline=True))
    except OfflineError as error:
        pytest.skip(str(error))
    texts = [*TEXTS, *_many_texts()]
    expected = SentenceTransformerEmbedder(folder).encode(texts)
    thin = BertEncoder(folder)
    for forward in (NumpyBert(thin._weights), TorchBert(thin._weights, "cpu")):
        assert np.abs(through(BertEncoder(folder), forward).encode(texts) - expected).max() < 1e-5, forward.name


def _many_texts() -> list[str]:
    chance = random.Random(0)
    words = [
        "Naïve",
        "東京",
        "token-level",
        "don't",
        "3.14",
        "https://a.b/c?d=e",
        "foo_bar",
        "Straße",
        "🙂",
        "the",
        "of",
    ]
    lengths = [1, 3, 8, 21, 60, 200]
    return [" ".join(chance.choices(words, k=length)) for length in lengths for _ in range(2)]
