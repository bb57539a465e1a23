"""Tiny random models of every family, as transformers builds them, and a byte-level tokenizer beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ragkit.generation.decoder import Decoder
from ragkit.generation.engine import Engine
from ragkit.generation.weights import assemble_weights
from ragkit.kernels.backend import Backend
from ragkit.models.model_config import model_config

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip

KERNELS = (
    "ragkit.generation.page_attention", "ragkit.kvcache.page_scoring", "ragkit.kvcache.page_selector_soft_vote",
    "ragkit.kernels.gather_pages", "ragkit.kernels.page_bounds", "ragkit.kernels.page_log_sums",
    "ragkit.kernels.page_scores", "ragkit.kernels.page_top_k", "ragkit.kernels.rope_write_kv",
    "ragkit.kernels.selected_attention", "ragkit.kernels.selected_pages_attention",
)  # fmt: skip


def hf_model(family: str, **changes):
    """Return a random transformers model of `family` in fp32, larger than usual weights so that tokens matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def decoder_of(model) -> Decoder:
    """Return our decoder with the weights of a transformers model."""
    config = model_config(model.config.to_dict(), model.config.eos_token_id)
    state = model.state_dict()
    return Decoder(config, assemble_weights(lambda name: state[name].clone(), config))


@pytest.fixture
def be_a_gpu(monkeypatch):
    """Have attention over pages take its kernels from now on, and look at no number, as it does on a GPU."""
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU")

    def be() -> None:
        for module in KERNELS:
            monkeypatch.setattr(f"{module}.resolve_backend", lambda tensor, backend=None: backend or Backend.TRITON)
        for module in ("selected_attention", "selected_pages_attention"):
            monkeypatch.setattr(f"ragkit.kernels.{module}._check_inputs", lambda *arguments: None)

    return be


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer of 3 control tokens and 256 bytes, with a chat template."""
    vocab = {token: index for index, token in enumerate(CONTROL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    hf_model("llama").save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def engine(tiny_folder) -> Engine:
    return Engine.load(tiny_folder, device="cpu", dtype="float32")
