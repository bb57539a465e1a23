import pytest
import torch

from ragkit.errors import GenerationError, ModelError
from ragkit.generation.attention import StandaloneAttention
from ragkit.generation.weights import assemble_weights, load_weights
from ragkit.kvcache.rope import RotaryTable
from ragkit.models.model_config import load_model_config, model_config

from .conftest import decoder_of, hf_model

LIMIT = 2e-4  # of logits that are about 10 in size, fp32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": ("llama", {}),
    "llama without groups": ("llama", {"num_key_value_heads": 6}),
    "llama with one key head": ("llama", {"num_key_value_heads": 1}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama with tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "llama with its own head size": ("llama", {"head_dim": 20}),
    "llama, linear RoPE": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama, dynamic RoPE": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama, dynamic RoPE beyond its window": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 40},
    ),
    "llama, YaRN": ("llama", {"rope_parameters": YARN}),
    "llama, llama3 RoPE": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2 with tied embeddings": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_logits_are_those_of_transformers(name):
    family, changes = FAMILIES[name]
    if "rope_parameters" in changes:
        changes = {**changes, "rope_parameters": {"rope_theta": 10000.0, **changes["rope_parameters"]}}
    model = hf_model(family, **changes)
    decoder = decoder_of(model)
    token_ids = torch.randint(0, 300, (70,), generator=torch.Generator().manual_seed(1))
    expected = model(token_ids.unsqueeze(0)).logits[0]
    rotary = RotaryTable.build(decoder.config.rope, decoder.config.head_dim, 70, decoder.device, length=70)
    got = decoder.logits(decoder.run(token_ids, StandaloneAttention(rotary, decoder.scale)))
    assert float(expected.std()) > 1
    assert float((got - expected).abs().max()) < LIMIT


@torch.inference_mode()
def test_kept_keys_are_those_before_rotation():
    decoder = decoder_of(hf_model("qwen3", head_dim=16))
    rotary = RotaryTable.build(decoder.config.rope, 16, 40, decoder.device)
    one, two = (StandaloneAttention(rotary, decoder.scale) for _ in range(2))
    decoder.run([5, 9, 7], one)
    decoder.run([8, 8, 5, 9, 7], two)
    # Layer 0 sees the token alone, so its key is the same wherever the token stands.
    torch.testing.assert_close(one.kept[0][0], two.kept[0][0][2:])


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(GenerationError, match="below 300, got 1 to 300"):
        decoder_of(hf_model("llama")).embed([1, 300])


def test_safetensors_give_the_same_weights_as_the_model(tiny_folder):
    config = load_model_config(tiny_folder)
    loaded = load_weights(tiny_folder, config, torch.device("cpu"), torch.float32)
    state = hf_model("llama").state_dict()
    expected = assemble_weights(lambda name: state[name], config)
    rows = torch.randn(4, config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.embedding, expected.embedding)
    assert torch.equal(loaded.layers[2].qkv(rows), expected.layers[2].qkv(rows))
    assert torch.equal(loaded.head(rows), expected.head(rows))


def test_a_tensor_of_another_shape_is_named():
    model = hf_model("llama")
    config = model_config({**model.config.to_dict(), "intermediate_size": 81})
    state = model.state_dict()
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.gate_proj\.weight is \(80, 48\), the config says \(81, 48\)"
    ):
        assemble_weights(lambda name: state[name], config)


def test_a_missing_weight_file_is_named(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-00001.safetensors"}}'
    )
    with pytest.raises(ModelError, match=r"lacks the weight files model-00001\.safetensors"):
        load_weights(tmp_path, load_model_config(tmp_path), torch.device("cpu"), torch.float32)


def test_damaged_weights_are_refused(tiny_folder, tmp_path):
    content = (tiny_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        load_weights(tmp_path, load_model_config(tiny_folder), torch.device("cpu"), torch.float32)
