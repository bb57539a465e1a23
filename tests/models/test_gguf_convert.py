import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from ragkit.errors import ModelError
from ragkit.models import resolve
from ragkit.models.gguf_convert import convert_gguf
from ragkit.models.model_config import load_model_config
from ragkit.models.tokenizer import ModelTokenizer

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he"]


def _model(family, **changes):
    config = AutoConfig.for_model(
        family, vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config)


def _gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    return f"blk.{stem.split('.')[2]}.{NAMES[stem.split('.')[-1]]}.{kind}"


def _interleaved(weight, heads):
    # What llama.cpp's converter does to queries and keys of this architecture.
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _write(path, model, *, pre="smollm", architecture=None, extra=(), quantised=False, **fields):
    config = model.config
    arch = architecture or config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if config.model_type != "qwen2" else 16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, value in fields.items():
        writer.add_string(f"{arch}.{name}", value)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "llama" and ".q_proj" in name:
            array = _interleaved(array, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj" in name:
            array = _interleaved(array, config.num_key_value_heads)
        if quantised and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(array))
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {}), ("qwen2", {}), ("qwen3", {"head_dim": 32})],
)
def test_every_weight_comes_back_under_its_name(family, changes, tmp_path):
    model = _model(family, **changes)
    folder = tmp_path / "out"
    folder.mkdir()
    convert_gguf(_write(tmp_path / "m.gguf", model), folder)
    expected = {name: weight.numpy() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    got = load_file(folder / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_quantised_weights_are_close_and_sizes_are_kept(tmp_path):
    model = _model("llama", tie_word_embeddings=True)
    folder = resolve(str(_write(tmp_path / "m.gguf", model, quantised=True)))
    got, expected = load_file(folder / "model.safetensors"), model.state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert float(np.abs(got[name] - expected[name].numpy()).max()) < 1e-3
    config = load_model_config(folder)
    assert (config.num_layers, config.num_kv_heads, config.head_dim, config.rope.theta) == (2, 2, 16, 50000.0)
    assert (config.rms_norm_eps, config.stop_token_ids, config.tied_embeddings) == (1e-6, (2, 0), True)


def test_a_gguf_file_is_converted_once(tmp_path, monkeypatch):
    file = _write(tmp_path / "m.gguf", _model("llama"))
    folder = resolve(str(file))
    monkeypatch.setattr("ragkit.models.gguf_convert.convert_gguf", lambda *_: pytest.fail("converted again"))
    assert resolve(str(file)) == folder


def test_many_shards_are_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkit.models.gguf_convert._SHARD_BYTES", 40_000)
    model = _model("llama")
    folder = resolve(str(_write(tmp_path / "m.gguf", model)))
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 3
    assert places.keys() == model.state_dict().keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(load_file(folder / places[name])[name], model.state_dict()[name].numpy())


def test_the_tokenizer_splits_digits_and_parses_no_control_tokens(tmp_path):
    tokenizer = ModelTokenizer(resolve(str(_write(tmp_path / "m.gguf", _model("llama")))))
    assert tokenizer.decode(tokenizer.encode("12 the <|im_end|>")) == "12 the <|im_end|>"
    assert tokenizer.encode(" the")[0] == TOKENS.index("Ġt")
    assert 2 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode_template("<|im_end|>") == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "reads GGUF of llama, qwen2, qwen3"),
        ({"pre": "odd"}, "splitting 'odd'"),
        ({"extra": ["rope_freqs.weight"]}, "the tensor 'rope_freqs.weight'"),
        ({"rope.scaling.type": "yarn"}, "RoPE scaling 'yarn'"),
    ],
)
def test_what_is_not_known_is_refused(changes, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        resolve(str(_write(tmp_path / "m.gguf", _model("llama"), **changes)))
