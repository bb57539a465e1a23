"""A decoder's sizes and rotary settings, read from `config.json` without transformers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ragkit.errors import ModelError


class RopeType(StrEnum):
    """How rotary frequencies are scaled; values are those of `config.json`."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position settings of one layer.

    Attributes:
        theta: base wavelength.
        rope_type: how frequencies are scaled beyond the trained window.
        factor: scaling factor, 1 for the default type.
        max_position: the window that `dynamic` starts to stretch at.
        original_max_position: the window before scaling (YaRN, llama3).
        beta_fast, beta_slow, truncate: YaRN's correction range.
        attention_factor: YaRN's factor on cos and sin, already worked out; 1 elsewhere.
        low_freq_factor, high_freq_factor: llama3's wavelength bounds.
    """

    theta: float = 10000.0
    rope_type: RopeType = RopeType.DEFAULT
    factor: float = 1.0
    max_position: int = 2048
    original_max_position: int = 2048
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes of a decoder-only model.

    Attributes:
        family: `model_type` of config.json, one of `FAMILIES`.
        qkv_bias, output_bias: whether the attention projections add a bias.
        qk_norm: whether queries and keys are RMS-normalised per head before rotation.
        tied_embeddings: whether the output projection is the embedding.
        max_context: the window in tokens.
        stop_token_ids: tokens that end an answer.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_context: int
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """How one model family differs from plain Llama.

    Attributes:
        qkv_bias, output_bias: fixed by the family, or None where `attention_bias` of the config says it.
        qk_norm: per-head normalisation of queries and keys.
    """

    qkv_bias: bool | None
    output_bias: bool | None
    qk_norm: bool


FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias=None, output_bias=None, qk_norm=False),  # also SmolLM and SmolLM2
    "mistral": Family(qkv_bias=False, output_bias=False, qk_norm=False),
    "qwen2": Family(qkv_bias=True, output_bias=False, qk_norm=False),
    "qwen3": Family(qkv_bias=None, output_bias=None, qk_norm=True),
}


def load_model_config(folder: Path) -> ModelConfig:
    """Return the sizes of the model in `folder`.

    Raises:
        ModelError: the config cannot be read, or the model does something that ragkit does not compute.
    """
    raw = _json(folder / "config.json")
    generation = folder / "generation_config.json"
    stops = _json(generation).get("eos_token_id") if generation.is_file() else None
    return model_config(raw, stops if stops is not None else raw.get("eos_token_id"), str(folder))


def model_config(raw: Mapping[str, Any], stop_ids: Any = None, where: str = "the model") -> ModelConfig:
    """Return the sizes that the content `raw` of a config.json states; `stop_ids` is an id, a list of ids or None."""
    family = FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        raise ModelError(
            f"{where} is of type {raw.get('model_type')!r}; ragkit runs {', '.join(FAMILIES)}: choose such a model"
        )
    _refuse_unsupported(raw, where)
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        bias = bool(raw.get("attention_bias", False))
        return ModelConfig(
            family=raw["model_type"],
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_q_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope=_rope(raw, where),
            qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=bias if family.output_bias is None else family.output_bias,
            qk_norm=family.qk_norm,
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_context=int(raw["max_position_embeddings"]),
            stop_token_ids=_stop_ids(stop_ids),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the config.json of {where} is not usable: {error!r}") from error


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    window = raw.get("sliding_window")
    uses_window = raw.get("use_sliding_window", raw.get("model_type") == "mistral") and window is not None
    if uses_window or "sliding_attention" in (raw.get("layer_types") or ()):
        raise ModelError(f"{where} uses sliding-window attention ({window} tokens), which ragkit does not compute")
    if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias", False):
        raise ModelError(f"{where} has another feed-forward layer than SwiGLU without bias; ragkit does not run it")
    if raw.get("quantization_config"):
        raise ModelError(f"{where} holds quantised weights; take the unquantised safetensors, or a GGUF file")


def _rope(raw: Mapping[str, Any], where: str) -> RopeConfig:
    # transformers 5 writes rope_parameters; before, rope_theta stood alone beside rope_scaling.
    scaling = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name not in set(RopeType):
        raise ModelError(f"{where} uses RoPE scaling {name!r}; ragkit computes {', '.join(RopeType)}")
    if float(scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError(f"{where} rotates a part of each head only, which ragkit does not compute")
    window = int(raw["max_position_embeddings"])
    original = int(scaling.get("original_max_position_embeddings") or window)
    factor = scaling.get("factor")
    stated = RopeConfig(
        theta=float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_type=RopeType(name),
        factor=float(factor) if factor is not None else window / original,
        max_position=window,
        original_max_position=original,
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        truncate=bool(scaling.get("truncate", True)),
        low_freq_factor=float(scaling.get("low_freq_factor") or 1.0),
        high_freq_factor=float(scaling.get("high_freq_factor") or 4.0),
    )
    if stated.rope_type is not RopeType.YARN:
        return stated

    return dataclasses.replace(stated, attention_factor=_yarn_attention_factor(scaling, stated.factor))


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    # YaRN, arXiv 2309.00071, equation 22, with the two optional weights of DeepSeek's configs.

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(float(scaling["mscale"])) / scale(float(scaling["mscale_all_dim"]))
    return scale(1.0)


def _stop_ids(stated: Any) -> tuple[int, ...]:
    if stated is None:
        return ()
    return tuple(int(token) for token in (stated if isinstance(stated, list) else [stated]))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no object")
    return content
