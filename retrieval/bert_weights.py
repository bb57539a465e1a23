"""The weights of a BERT encoder under short names, fused for one matrix product per projection.

BERT: Devlin et al., 2019 (arXiv 1810.04805). Post-norm layers: attention, add and norm, two-layer MLP, add and norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkit.errors import ModelError
from ragkit.retrieval.base import FloatMatrix
from ragkit.retrieval.model_folder import ModelFolder
from ragkit.retrieval.safetensors_map import as_float32, map_tensors

FloatArray = NDArray[np.float32]

SUPPORTED_POOLING = ("mean", "cls", "mean_sqrt_len_tokens")
SUPPORTED_ACTIVATIONS = ("gelu", "relu")


@dataclass(frozen=True)
class BertLayer:
    """One layer. Matrices are (out, in); `qkv` is query, key and value stacked."""

    qkv: FloatArray
    qkv_bias: FloatArray
    out: FloatArray
    out_bias: FloatArray
    attention_norm: FloatArray
    attention_norm_bias: FloatArray
    up: FloatArray
    up_bias: FloatArray
    down: FloatArray
    down_bias: FloatArray
    output_norm: FloatArray
    output_norm_bias: FloatArray


@dataclass(frozen=True)
class BertWeights:
    """An encoder's weights and the facts its forward needs.

    Attributes:
        words: (vocabulary, hidden) embeddings, mapped from the file.
        positions: (positions, hidden), the embedding of token type 0 added.
    """

    words: FloatArray
    positions: FloatArray
    norm: FloatArray
    norm_bias: FloatArray
    layers: tuple[BertLayer, ...]
    heads: int
    epsilon: float
    activation: str
    pooling: str


def why_unsupported(folder: ModelFolder) -> str | None:
    """Return why the thin encoder cannot run `folder`, or None where it can."""
    config = folder.config
    reasons = [
        (config.get("model_type") != "bert", f"its model type is {config.get('model_type')!r}, not 'bert'"),
        (folder.modules not in (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")),
         f"its modules are {', '.join(folder.modules)}"),
        (len(folder.pooling) != 1 or folder.pooling[0] not in SUPPORTED_POOLING,
         f"its pooling is {', '.join(folder.pooling)}"),
        (config.get("hidden_act") not in SUPPORTED_ACTIVATIONS, f"its activation is {config.get('hidden_act')!r}"),
        (config.get("position_embedding_type", "absolute") != "absolute", "its positions are relative"),
        (folder.lowercases, "it asks for lower-casing outside its tokenizer"),
        (folder.max_tokens is None, "nothing says how long its window is"),
        (not (folder.path / "tokenizer.json").is_file(), "it has no tokenizer.json"),
        (len(folder.weights) != 1, f"it has {len(folder.weights)} weight files"),
    ]  # fmt: skip
    return next((reason for applies, reason in reasons if applies), None)


def load_bert_weights(folder: ModelFolder) -> BertWeights:
    """Return the weights of `folder`.

    Raises:
        ModelError: the folder is not of BERT type, or a tensor is missing or has another shape.
    """
    reason = why_unsupported(folder)
    if reason is not None:
        raise ModelError(f"the thin encoder cannot run {folder.path}: {reason}; use the sentence-transformers backend")
    tensors = map_tensors(folder.weights[0])
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in tensors else ""

    def take(name: str) -> FloatArray:
        try:
            return as_float32(tensors[prefix + name])
        except KeyError as error:
            raise ModelError(f"{folder.weights[0]} has no tensor {name}; fetch the model again") from error

    config = folder.config
    weights = BertWeights(
        words=take("embeddings.word_embeddings.weight"),
        positions=take("embeddings.position_embeddings.weight") + take("embeddings.token_type_embeddings.weight")[0],
        norm=take("embeddings.LayerNorm.weight"),
        norm_bias=take("embeddings.LayerNorm.bias"),
        layers=tuple(_layer(take, f"encoder.layer.{index}.") for index in range(config["num_hidden_layers"])),
        heads=int(config["num_attention_heads"]),
        epsilon=float(config.get("layer_norm_eps", 1e-12)),
        activation=str(config["hidden_act"]),
        pooling=folder.pooling[0],
    )
    _check_shapes(weights, config)
    return weights


def pool_tokens(states: FloatMatrix, lengths: NDArray[np.int64], pooling: str) -> FloatMatrix:
    """Return (sequences, hidden) from packed token states (tokens, hidden)."""
    starts = np.cumsum(lengths) - lengths
    pooled: FloatMatrix
    if pooling == "cls":
        pooled = states[starts]
        return pooled
    divisor = np.sqrt(lengths) if pooling == "mean_sqrt_len_tokens" else lengths
    sums: FloatMatrix = np.add.reduceat(states, starts, axis=0)
    pooled = sums / divisor.astype(np.float32)[:, None]
    return pooled


def _layer(take: Any, name: str) -> BertLayer:
    attention = [f"{name}attention.self.{part}." for part in ("query", "key", "value")]
    return BertLayer(
        qkv=np.concatenate([take(part + "weight") for part in attention]),
        qkv_bias=np.concatenate([take(part + "bias") for part in attention]),
        out=take(name + "attention.output.dense.weight"),
        out_bias=take(name + "attention.output.dense.bias"),
        attention_norm=take(name + "attention.output.LayerNorm.weight"),
        attention_norm_bias=take(name + "attention.output.LayerNorm.bias"),
        up=take(name + "intermediate.dense.weight"),
        up_bias=take(name + "intermediate.dense.bias"),
        down=take(name + "output.dense.weight"),
        down_bias=take(name + "output.dense.bias"),
        output_norm=take(name + "output.LayerNorm.weight"),
        output_norm_bias=take(name + "output.LayerNorm.bias"),
    )


def _check_shapes(weights: BertWeights, config: Any) -> None:
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    expected = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for index, layer in enumerate(weights.layers):
        for name, shape in expected.items():
            got = getattr(layer, name).shape
            if got != shape:
                raise ModelError(f"layer {index}: {name} has shape {got}, its config.json says {shape}")
    if hidden % weights.heads or weights.words.shape[1] != hidden:
        raise ModelError(
            f"hidden size {hidden} does not fit {weights.heads} heads and {weights.words.shape} embeddings"
        )
