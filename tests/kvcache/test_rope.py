import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ragkit.kvcache.rope import RotaryTable, inv_freq, rotate
from ragkit.models.model_config import model_config

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn with bounds": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0,
        "beta_slow": 2.0, "truncate": False,
    },
    "yarn with weights": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn with attention factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.5,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def _config(scaling: dict, theta: float = 10000.0) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, rope_parameters={"rope_theta": theta, **scaling},
    )  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [100, 700])
def test_cosines_and_sines_are_those_of_transformers(name, length):
    config = _config(SCALINGS[name], theta=50000.0)
    positions = torch.arange(length)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions.unsqueeze(0))
    rope = model_config(config.to_dict()).rope
    table = RotaryTable.build(rope, 64, length, torch.device("cpu"), length)
    torch.testing.assert_close(table.cos, cos[0, :, :32], rtol=0, atol=1e-4)
    torch.testing.assert_close(table.sin, sin[0, :, :32], rtol=0, atol=1e-4)


def test_the_settings_of_older_config_files_are_understood():
    raw = _config({}).to_dict()
    del raw["rope_parameters"]
    raw |= {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = model_config(raw).rope
    assert (rope.theta, rope.rope_type, rope.factor) == (77.0, "linear", 2.0)


def test_dynamic_frequencies_are_plain_within_the_window_and_stretch_beyond():
    rope = model_config(_config(SCALINGS["dynamic"]).to_dict()).rope
    plain = model_config(_config(SCALINGS["default"]).to_dict()).rope
    assert torch.equal(inv_freq(rope, 64, 256), inv_freq(plain, 64))
    assert bool((inv_freq(rope, 64, 512)[1:] < inv_freq(plain, 64)[1:]).all())


def test_scores_depend_on_the_distance_alone():
    table = RotaryTable.build(model_config(_config({}).to_dict()).rope, 64, 200, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(0))

    def score(at: int, of: int) -> float:
        turned = table.rotate(query, torch.tensor([at])) * table.rotate(key, torch.tensor([of]))
        return float(turned.sum())

    assert score(30, 10) == pytest.approx(score(180, 160), abs=1e-4)
    assert score(30, 10) != pytest.approx(score(31, 10), abs=1e-3)


def test_position_zero_leaves_heads_as_they_are():
    heads = torch.randn(3, 2, 8)
    assert torch.equal(rotate(heads, torch.ones(3, 4), torch.zeros(3, 4)), heads)
