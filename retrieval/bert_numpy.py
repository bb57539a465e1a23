"""The BERT forward in numpy: for a question, so that a search need not import torch (1.5 s and more)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ragkit.retrieval.base import FloatMatrix
from ragkit.retrieval.bert_weights import BertLayer, BertWeights, FloatArray, pool_tokens


class NumpyBert:
    """Runs packed sequences in fp32 on the CPU. Equal to the torch forward within 1e-5."""

    name = "numpy"

    def __init__(self, weights: BertWeights) -> None:
        self._weights = weights

    def pooled(self, token_ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> FloatMatrix:
        """Return (sequences, hidden), not normalised.

        Args:
            token_ids: ids of all sequences, one behind the other, special tokens included.
            lengths: tokens of each sequence; sequences of equal length stand together.
        """
        weights = self._weights
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(len(token_ids)) - np.repeat(starts, lengths)
        states = weights.words[token_ids] + weights.positions[positions]
        states = _layer_norm(states, weights.norm, weights.norm_bias, weights.epsilon)
        groups = equal_length_groups(lengths)
        for layer in weights.layers:
            states = self._layer(states, layer, groups)
        return pool_tokens(states, lengths, weights.pooling)

    def _layer(self, states: FloatArray, layer: BertLayer, groups: list[tuple[int, int, int]]) -> FloatArray:
        weights = self._weights
        qkv = states @ layer.qkv.T + layer.qkv_bias
        context = np.empty_like(states)
        for start, count, length in groups:
            rows = slice(start, start + count * length)
            context[rows] = _attention(qkv[rows], count, length, weights.heads)
        states = states + (context @ layer.out.T + layer.out_bias)
        states = _layer_norm(states, layer.attention_norm, layer.attention_norm_bias, weights.epsilon)
        inner = states @ layer.up.T + layer.up_bias
        inner = gelu(inner) if weights.activation == "gelu" else np.maximum(inner, 0)
        states = states + (inner @ layer.down.T + layer.down_bias)
        return _layer_norm(states, layer.output_norm, layer.output_norm_bias, weights.epsilon)


def equal_length_groups(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return (first token, sequences, length) of each run of equally long sequences.

    Runs let attention go without masks and without padding.
    """
    groups: list[tuple[int, int, int]] = []
    start = 0
    boundaries = np.flatnonzero(np.diff(lengths)) + 1
    for run in np.split(lengths, boundaries):
        if len(run):
            groups.append((start, len(run), int(run[0])))
            start += int(run.sum())
    return groups


def gelu(values: FloatArray) -> FloatArray:
    """Return x * Phi(x) with the error function by formula 7.1.26 of Abramowitz and Stegun (error below 1.5e-7)."""
    scaled = values * np.float32(0.7071067811865476)
    size = np.abs(scaled)
    t = 1.0 / (1.0 + np.float32(0.3275911) * size)
    series = np.float32(1.061405429) * t - np.float32(1.453152027)
    for coefficient in (1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(coefficient)
    error_function = np.copysign(1.0 - series * t * np.exp(-size * size), scaled)
    result: FloatArray = (values * np.float32(0.5) * (1.0 + error_function)).astype(np.float32, copy=False)
    return result


def _attention(qkv: FloatArray, count: int, length: int, heads: int) -> FloatArray:
    hidden = qkv.shape[1] // 3
    split = qkv.reshape(count, length, 3, heads, hidden // heads).transpose(2, 0, 3, 1, 4)
    query, key, value = split[0], split[1], split[2]
    scores = query @ key.swapaxes(-1, -2) * np.float32((hidden // heads) ** -0.5)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    context: FloatArray = (scores @ value).transpose(0, 2, 1, 3).reshape(count * length, hidden)
    return context


def _layer_norm(states: FloatArray, weight: FloatArray, bias: FloatArray, epsilon: float) -> FloatArray:
    centred = states - states.mean(axis=-1, keepdims=True)
    variance = np.einsum("ij,ij->i", centred, centred)[:, None] / np.float32(states.shape[-1])
    result: FloatArray = centred / np.sqrt(variance + np.float32(epsilon)) * weight + bias
    return result
