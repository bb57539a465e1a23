"""A generator of a few thousand random weights with a byte-level tokenizer, written as a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "model_type": "llama", "vocab_size": 259, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
_SPREAD = 0.3  # larger than usual, so that every token of the prompt matters


def write_generator(folder: Path, seed: int = 0) -> Path:
    """Write the model whose weights follow from `seed`; it never stops by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(_weights(seed), folder / "model.safetensors")
    vocab = {token: index for index, token in enumerate(CONTROL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
    return folder


def _weights(seed: int) -> dict[str, torch.Tensor]:
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv_size = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    shapes = {"model.embed_tokens": (CONFIG["vocab_size"], hidden), "model.norm": (hidden,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm": (hidden,), f"{at}.post_attention_layernorm": (hidden,)}
        shapes |= {f"{at}.self_attn.{part}_proj": (hidden, hidden) for part in "qo"}
        shapes |= {f"{at}.self_attn.{part}_proj": (kv_size, hidden) for part in "kv"}
        shapes |= {f"{at}.mlp.{part}_proj": (inner, hidden) for part in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj"] = (hidden, inner)
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * _SPREAD + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }
