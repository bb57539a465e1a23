"""8- and 4-bit KV that kernels can read as it is: keys grouped along the tokens, values along the channels.

KIVI (arXiv 2402.02750) found keys to have outlier channels and values none; KVQuant (arXiv 2401.18079, section 3.2)
that keys are easier before RoPE, which mixes channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.kernels.dequantize_kv import dequantize_kv
from ragkit.kernels.placement_table import ChunkFormat, Section
from ragkit.kernels.quantize_kv import QuantizedHeads, quantize_kv
from ragkit.kvcache.codec import (
    LayerKV,
    join_sections,
    join_sections_of_layers,
    require_encodable,
    rounding,
    section_bytes,
    split_sections,
)
from ragkit.kvcache.layout import KVLayout


def value_channels(head_dim: int, group: int) -> int:
    """Return how many channels of a value share a scale: the largest power of two up to `group` in half a head."""
    half = head_dim // 2
    return min(group, half & -half)


class QuantizedCodec:
    """Keys and values as codes of `bits` with an fp16 scale and zero for each group of `group` numbers.

    A key group is `group` tokens of one channel. A value group is up to `group` channels of one token: the largest
    power of two that divides half a head, so that rotation pairs never straddle two groups.
    """

    def __init__(self, name: str, layout: KVLayout, bits: int, group: int) -> None:
        self.codec_id = f"{name}-group{group}"
        self.layout = layout
        self.bits = bits
        self.group = group
        self.draft = None

    def format(self, layer: int) -> ChunkFormat:
        """Return codes and their groups."""
        return ChunkFormat.codes(self.bits, self.group, value_channels(self.layout.layers[layer].head_dim, self.group))

    def encode(self, layers: Sequence[LayerKV]) -> list[Tensor]:
        """Return the bytes of each layer: codes, scales and zeros of the keys, then of the values."""
        require_encodable(layers)
        if not layers or len({(keys.shape, values.shape) for keys, values in layers}) > 1:
            return [join_sections([*self._keys(keys), *self._values(values)]) for keys, values in layers]
        # Groups never span heads, so all layers are quantised as one with many heads: a GPU waits for launches else.
        keys, values = (torch.cat(heads, dim=1) for heads in zip(*layers, strict=True))
        return join_sections_of_layers([*self._keys(keys), *self._values(values)], len(layers))

    def decode(self, encoded: Sequence[Tensor], tokens: int, first_layer: int = 0) -> list[LayerKV]:
        """Return keys and values of each given layer."""
        layers = []
        for index, data in enumerate(encoded, first_layer):
            spec = self.layout.layers[index]
            out = torch.empty(
                (2, tokens, spec.num_kv_heads, spec.head_dim), dtype=self.layout.dtype, device=data.device
            )
            keys, values = self.views(data, tokens, index)
            dequantize_kv(keys, out[0], token_group=self.group)
            dequantize_kv(values, out[1], token_group=1)
            layers.append((out[0], out[1]))
        return layers

    def views(self, data: Tensor, tokens: int, layer: int) -> tuple[QuantizedHeads, QuantizedHeads]:
        """Return the keys' and values' codes within the bytes of one layer, for kernels that read them directly."""
        parts = split_sections(data, self._sections(layer, tokens))
        return QuantizedHeads(*parts[:3]), QuantizedHeads(*parts[3:])

    def error_bounds(self, layers: Sequence[LayerKV]) -> list[LayerKV]:
        """Return half the scale of each number's group, plus what the output type rounds."""
        bounds = []
        for keys, values in layers:
            key_scale = self._keys(keys).scale.float().repeat_interleave(self.group, 0)[: len(keys)]
            value_scale = self._values(values).scale.float()
            value_scale = value_scale.repeat_interleave(values.shape[2] // max(value_scale.shape[2], 1), 2)
            bounds.append((self._bound(keys, key_scale), self._bound(values, value_scale)))
        return bounds

    def bytes_per_token(self, tokens: int) -> float:
        """Return the exact bytes a token takes in a chunk of `tokens`."""
        layers = range(self.layout.num_layers)
        return sum(section_bytes(self._sections(layer, tokens)) for layer in layers) / max(tokens, 1)

    def _keys(self, keys: Tensor) -> QuantizedHeads:
        return quantize_kv(keys, bits=self.bits, token_group=self.group, channel_group=1)

    def _values(self, values: Tensor) -> QuantizedHeads:
        return quantize_kv(
            values, bits=self.bits, token_group=1, channel_group=value_channels(values.shape[2], self.group)
        )

    def _bound(self, heads: Tensor, scale: Tensor) -> Tensor:
        # The decoded number is rounded, and lies up to half a scale further from zero than the original.
        return scale / 2 + rounding(heads.float().abs() + scale, self.layout.dtype) * 2

    def _sections(self, layer: int, tokens: int) -> list[Section]:
        spec = self.layout.layers[layer]
        return self.format(layer).sections(tokens, spec.num_kv_heads, spec.head_dim)
