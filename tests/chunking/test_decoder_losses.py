"""Streaming losses are those of one full pass, the window forgets without moving positions, no token runs twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ragkit.chunking.decoder_losses import DecoderLosses
from ragkit.errors import GenerationError, UsageError
from ragkit.generation.decoder import Decoder
from ragkit.generation.weights import assemble_weights
from ragkit.models.model_config import model_config


def model_of(layers: int, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=2, initializer_range=0.4, **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def decoder_of(model) -> Decoder:
    state = model.state_dict()
    config = model_config(model.config.to_dict(), model.config.eos_token_id)
    return Decoder(config, assemble_weights(lambda name: state[name].clone(), config))


def full_losses(model, ids):
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()


def text_of(tokens, seed=0):
    return np.random.default_rng(seed).integers(3, 97, size=tokens).tolist()


@pytest.fixture(scope="module")
def model():
    return model_of(3)


@pytest.mark.parametrize("segment", [1, 7, 64])
def test_while_the_window_holds_all_the_losses_are_those_of_one_pass(model, segment):
    ids = text_of(60)
    losses = DecoderLosses(decoder_of(model), window=60, segment=segment).token_losses([ids])[0]
    assert losses == pytest.approx(full_losses(model, ids), abs=1e-4)


def test_behind_the_window_distances_stay_right():
    # In a model of one layer a key depends on its own token alone, so only the first four tokens and the window matter.
    model = model_of(1)
    ids = text_of(120)
    losses = DecoderLosses(decoder_of(model), window=16, segment=10).token_losses([ids])[0]
    for start in range(30, 110, 10):
        seen = full_losses(model, ids[:4] + ids[start - 16 : start + 11])[20:]
        assert losses[start : start + 10] == pytest.approx(seen[: len(losses) - start], abs=1e-4)


def test_a_text_may_be_longer_than_the_trained_window(model):
    losses = DecoderLosses(decoder_of(model), window=60, segment=64).token_losses([text_of(1000)])[0]
    assert losses.shape == (999,)
    assert np.isfinite(losses).all()


def test_texts_in_one_batch_do_not_see_each_other(model):
    texts = [text_of(size, seed) for seed, size in enumerate((50, 1, 0, 2, 90, 33))]
    together = DecoderLosses(decoder_of(model), window=32, segment=20, batch=45).token_losses(texts)
    for text, found in zip(texts, together, strict=True):
        alone = DecoderLosses(decoder_of(model), window=32, segment=20, batch=20).token_losses([text])[0]
        assert len(found) == max(0, len(text) - 1)
        if len(text) <= 33:
            assert found == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("batch", [20, 45, 1000])
def test_what_shares_a_pass_changes_no_loss(model, batch, grouped):
    # Texts of many segments, of one, and of fewer tokens than the window; passes end between their segments.
    texts = [text_of(size, seed) for seed, size in enumerate((130, 33, 200, 5, 20, 61))]
    losses = DecoderLosses(decoder_of(model), window=32, segment=20, batch=batch, grouped=grouped)
    alone = DecoderLosses(decoder_of(model), window=32, segment=20, batch=20, grouped=False)
    for text, found in zip(texts, losses.token_losses(texts), strict=True):
        assert found == pytest.approx(alone.token_losses([text])[0], abs=1e-4)


def test_an_id_beyond_the_vocabulary_is_refused(model):
    with pytest.raises(GenerationError, match="below 97, got 3 to 97"):
        DecoderLosses(decoder_of(model)).token_losses([[3, 97]])


def test_every_token_is_forwarded_once(model):
    losses = DecoderLosses(decoder_of(model), window=32, segment=20, batch=64)
    losses.token_losses([text_of(500), text_of(77), text_of(3)])
    assert losses.tokens_forwarded == 580


def test_a_window_beyond_the_model_is_refused(model):
    with pytest.raises(UsageError, match="at most 124 tokens for this model, got 100, 25 and 4096"):
        DecoderLosses(decoder_of(model), window=100, segment=25)


def test_a_model_with_a_small_window_gets_a_window_and_segments_that_fit(model):
    losses = DecoderLosses(decoder_of(model))
    assert losses.settings == "window 42 segment 82 torch.float32"
    assert np.isfinite(losses.token_losses([text_of(1000)])[0]).all()
    assert losses.tokens_forwarded == 1000
