"""The transformer decoder, run layer by layer: everything but attention, which the caller brings.

Llama (arXiv 2302.13971) with the differences that `ModelConfig` states: grouped key heads, biases, per-head
normalisation of queries and keys. What attention does (which rows it writes, which it sees, at which positions) is
an `Attend`; so full prefill, reuse of cached chunks and decoding all run this same loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.errors import GenerationError
from ragkit.generation.dense_steps import DenseSteps
from ragkit.generation.host_memory import keep_freed_memory
from ragkit.generation.weights import DecoderWeights, LayerWeights, load_weights
from ragkit.kernels.add_rms_norm import add_rms_norm
from ragkit.kernels.silu_mul import silu_mul
from ragkit.kvcache.layout import KVLayout
from ragkit.models.model_config import ModelConfig, load_model_config


class Attend(Protocol):
    """Attention of one forward pass, called once a layer in order."""

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return (tokens, q_heads, head_dim), the attention output of the pass's tokens, or of the last ones only.

        Args:
            layer: index of the layer.
            queries: (tokens, q_heads, head_dim) before rotation; may be overwritten.
            keys, values: (tokens, kv_heads, head_dim), keys after bias and norm and before rotation; as queries.
        """
        ...


class Activations(NamedTuple):
    """The residual stream between layers: `hidden` is still to be added to `residual`.

    Attributes:
        hidden: (tokens, hidden_size), what the last step computed.
        residual: (tokens, hidden_size), the sum before it, or None before the first layer.
    """

    hidden: Tensor
    residual: Tensor | None

    def rows(self, index: slice | Tensor) -> Activations:
        """Return the activations of some of the tokens."""
        return Activations(self.hidden[index], None if self.residual is None else self.residual[index])


class Projected(NamedTuple):
    """What a layer gives attention.

    Attributes:
        queries: (tokens, q_heads, head_dim), before rotation.
        keys, values: (tokens, kv_heads, head_dim), keys after bias and norm and before rotation.
        residual: (tokens, hidden_size), which attention passes by.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    residual: Tensor


class Decoder:
    """A decoder-only language model with its weights on one device. Stateless between calls but for `dense_steps`.

    Attributes:
        config: sizes.
        layout: shape of its KV.
        device, dtype: where and in which type it computes.
        dense_steps: what passes over few tokens do between attentions, recorded as CUDA graphs.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self.layout = KVLayout.of(config, self.dtype)
        self.scale = config.head_dim**-0.5
        self.dense_steps = DenseSteps.on(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> Decoder:
        """Return the model in `folder`.

        Raises:
            ModelError: the model is not supported, or its files are missing or damaged.
        """
        config = load_model_config(folder)
        return cls(config, load_weights(folder, config, device, dtype))

    def embed(self, token_ids: Tensor | Sequence[int]) -> Activations:
        """Return the activations before the first layer of `token_ids` (tokens,).

        Raises:
            GenerationError: an id is not in the vocabulary.
        """
        if not isinstance(token_ids, Tensor):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.config.vocab_size:
                raise GenerationError(
                    f"token ids must lie below {self.config.vocab_size}, got {min(token_ids)} to {max(token_ids)}"
                )
            token_ids = torch.tensor(token_ids, dtype=torch.int64).to(self.device)
        return Activations(functional.embedding(token_ids, self.weights.embedding), None)

    def layer(self, index: int, activations: Activations, attend: Attend) -> Activations:
        """Return the activations after layer `index`, of the tokens that `attend` answers for."""
        projected = self.project(index, activations)
        attended = attend(index, projected.queries, projected.keys, projected.values)
        return self.complete(index, attended, projected.residual[len(projected.residual) - len(attended) :])

    def project(self, index: int, activations: Activations) -> Projected:
        """Return what layer `index` gives attention: the first half of the layer."""
        weights = self.weights.layers[index]
        eps = self.config.rms_norm_eps
        normed, residual = add_rms_norm(activations.hidden, activations.residual, weights.input_norm, eps)
        return Projected(*self._heads(weights, normed), residual)

    def complete(self, index: int, attended: Tensor, residual: Tensor) -> Activations:
        """Return the activations after layer `index`: the second half of the layer.

        Args:
            index: index of the layer.
            attended: (tokens, q_heads, head_dim), the attention output; tokens may be fewer than were projected.
            residual: (tokens, hidden_size), `Projected.residual` of the same tokens.
        """
        weights = self.weights.layers[index]
        projected = weights.output(attended.flatten(1))
        normed, residual = add_rms_norm(projected, residual, weights.feed_forward_norm, self.config.rms_norm_eps)
        gated = silu_mul(weights.gate_up(normed))
        return Activations(weights.down(gated), residual)

    def run(self, token_ids: Tensor | Sequence[int], attend: Attend) -> Activations:
        """Return the activations after the last layer."""
        activations = self.embed(token_ids)
        for index in range(self.config.num_layers):
            activations = self.layer(index, activations, attend)
        return activations

    def run_to_last(self, token_ids: Tensor | Sequence[int], attend: Attend) -> Projected:
        """Return what the last layer gives attention: what follows in it changes no row of keys and values."""
        last = self.config.num_layers - 1
        activations = self.embed(token_ids)
        for index in range(last):
            activations = self.layer(index, activations, attend)
        return self.project(last, activations)

    def logits(self, activations: Activations) -> Tensor:
        """Return (tokens, vocab_size) in the model's dtype from the activations after the last layer."""
        normed, _ = add_rms_norm(
            activations.hidden, activations.residual, self.weights.final_norm, self.config.rms_norm_eps
        )
        return self.weights.head(normed)

    def _heads(self, weights: LayerWeights, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        fused = weights.qkv(normed).unflatten(1, (-1, config.head_dim))
        sizes = [config.num_q_heads, config.num_kv_heads, config.num_kv_heads]
        queries, keys, values = fused.split(sizes, dim=1)
        if weights.query_norm is not None and weights.key_norm is not None:
            queries = self._normed_heads(queries, weights.query_norm)
            keys = self._normed_heads(keys, weights.key_norm)
        return queries, keys, values

    def _normed_heads(self, heads: Tensor, weight: Tensor) -> Tensor:
        flat = heads.reshape(-1, heads.shape[-1])
        return add_rms_norm(flat, None, weight, self.config.rms_norm_eps)[0].view(heads.shape)
