"""The shape of keys and values: what a KV block or a stored chunk consists of, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ragkit.models.model_config import ModelConfig, RopeConfig


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's keys and values: `(tokens, num_kv_heads, head_dim)` each, keys before RoPE.

    Attributes:
        num_kv_heads: key and value heads.
        head_dim: size of one head.
        rope: how keys are rotated when they are used.
        window: tokens that attention reaches back, or None for all of them.
    """

    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    window: int | None = None


@dataclass(frozen=True)
class KVLayout:
    """The layers of one model's KV cache and the type of its numbers."""

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype) -> KVLayout:
        """Return the layout of a model whose layers are all alike."""
        layer = LayerSpec(config.num_kv_heads, config.head_dim, config.rope)
        return cls((layer,) * config.num_layers, dtype)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes in all layers."""
        return sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.layers) * self.dtype.itemsize
