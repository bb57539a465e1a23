"""The KV as it is, in one float type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.kernels.placement_table import ChunkFormat, Section
from ragkit.kvcache.codec import LayerKV, join_sections, require_encodable, rounding, section_bytes, split_sections
from ragkit.kvcache.layout import KVLayout


class RawCodec:
    """Stores keys and values rounded to `dtype`, and nothing else: exact where the model computes in that type."""

    def __init__(self, codec_id: str, layout: KVLayout, dtype: torch.dtype) -> None:
        self.codec_id = codec_id
        self.layout = layout
        self.dtype = dtype
        self.draft = None

    def format(self, layer: int) -> ChunkFormat:
        """Return plain numbers."""
        return ChunkFormat.numbers(self.dtype)

    def encode(self, layers: Sequence[LayerKV]) -> list[Tensor]:
        """Return the bytes of each layer: keys, then values."""
        if self.dtype == torch.float16:  # what it cannot hold would become infinite, and so would every answer
            require_encodable(layers)
        return [join_sections([keys.to(self.dtype), values.to(self.dtype)]) for keys, values in layers]

    def decode(self, encoded: Sequence[Tensor], tokens: int, first_layer: int = 0) -> list[LayerKV]:
        """Return keys and values of each given layer; views of `encoded` where the type is the layout's own."""
        layers = []
        for index, data in enumerate(encoded, first_layer):
            keys, values = split_sections(data, self._sections(index, tokens))
            layers.append((keys.to(self.layout.dtype), values.to(self.layout.dtype)))
        return layers

    def error_bounds(self, layers: Sequence[LayerKV]) -> list[LayerKV]:
        """Return half a unit of the last place of `dtype` (0 for numbers that it holds)."""
        return [(self._bound(keys), self._bound(values)) for keys, values in layers]

    def bytes_per_token(self, tokens: int) -> float:
        """Return the exact bytes a token takes in a chunk of `tokens`."""
        layers = range(self.layout.num_layers)
        return sum(section_bytes(self._sections(layer, tokens)) for layer in layers) / max(tokens, 1)

    def _sections(self, layer: int, tokens: int) -> list[Section]:
        spec = self.layout.layers[layer]
        return self.format(layer).sections(tokens, spec.num_kv_heads, spec.head_dim)

    def _bound(self, heads: Tensor) -> Tensor:
        lossless = torch.promote_types(heads.dtype, self.dtype) == self.dtype
        return torch.zeros_like(heads, dtype=torch.float32) if lossless else rounding(heads, self.dtype)
