import pytest

from ragkit.errors import ModelError
from ragkit.models.model_config import load_model_config, model_config

LLAMA = {
    "model_type": "llama", "vocab_size": 10, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 100,
}  # fmt: skip


def test_missing_sizes_follow_from_the_others():
    config = model_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.tied_embeddings, config.stop_token_ids) == (4, 16, False, ())


@pytest.mark.parametrize(("stated", "expected"), [(5, (5,)), ([5, 6], (5, 6)), (None, ())])
def test_stop_tokens_are_one_or_many(stated, expected):
    assert model_config(LLAMA, stated).stop_token_ids == expected


def test_stop_tokens_of_the_generation_config_come_first(tmp_path):
    import json

    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 1}))
    assert load_model_config(tmp_path).stop_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert load_model_config(tmp_path).stop_token_ids == (2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "runs llama, mistral, qwen2, qwen3"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding-window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}, "sliding-window"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "SwiGLU"),
        ({"mlp_bias": True}, "SwiGLU"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE scaling 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
        ({"hidden_size": None}, "not usable"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        model_config({**LLAMA, **changes})


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_a_window_that_is_stated_but_not_used_is_accepted(model_type):
    raw = {**LLAMA, "model_type": model_type, "sliding_window": None if model_type == "mistral" else 4096}
    assert model_config({**raw, "use_sliding_window": False}).family == model_type
