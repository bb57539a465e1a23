"""Entropy-coded KV in CacheGen's manner: coarse steps, neighbour deltas, and a range coder, by layer and channel.

CacheGen (arXiv 2310.07240, section 5) found that neighbouring tokens of one layer and channel have similar keys and
values, that shallow layers bear less error than deep ones, and that statistics belong to channels. Here a channel is
cut into equal steps, keys before RoPE; each level is coded as its difference from none, half or all of the level
before it, whichever is shortest for the channel, with the best of 64 fixed distributions. Four channels make a stream
that decodes alone, so a chunk has thousands of them and a GPU thread takes one each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kernels.entropy_decode_kv import EntropyStreams, entropy_decode_kv
from ragkit.kernels.placement_table import ChunkFormat
from ragkit.kernels.rans_tables import CHANNELS_PER_STREAM, rans_tables, tables_digest
from ragkit.kvcache.codec import (
    LayerKV,
    join_sections,
    require_encodable,
    rounding,
    section_bytes,
    split_sections,
)
from ragkit.kvcache.layout import KVLayout
from ragkit.kvcache.rans_encode import choose_predictors, choose_tables, encode_streams

_MAX_TOKENS = 8192  # a stream counts its words in 16 bits
_MAX_LEVEL = 10000  # and a difference of levels has 16 bits
_KEY_SPREAD = 0.5  # a key channel's step grows with this power of its own spread; 0 is the least squared error


@dataclass(frozen=True, slots=True)
class EntropyLevel:
    """How coarse: steps in units of the spread of the numbers, for the shallow, middle and deep third of the layers."""

    keys: tuple[float, float, float]
    values: tuple[float, float, float]


# The last one is as coarse as CacheGen's default; the first has about the error of 4 bits in groups of 32.
LEVELS = {
    1: EntropyLevel((0.22, 0.27, 0.32), (0.22, 0.27, 0.32)),
    2: EntropyLevel((0.35, 0.50, 0.65), (0.35, 0.50, 0.65)),
    3: EntropyLevel((0.50, 1.00, 1.50), (0.50, 1.00, 1.50)),
}


class EntropyCodec:
    """Keys and values as entropy-coded steps; level 1 is the finest."""

    def __init__(self, name: str, layout: KVLayout, level: int) -> None:
        if any(spec.num_kv_heads * spec.head_dim % CHANNELS_PER_STREAM for spec in layout.layers):
            raise KVCacheError(f"the entropy codec takes {CHANNELS_PER_STREAM} channels at a time: head_dim must fit")
        self.codec_id = f"{name}-{tables_digest()}"
        self.layout = layout
        self.draft = None
        self._level = LEVELS[level]

    def format(self, layer: int) -> ChunkFormat:
        """Return streams."""
        return ChunkFormat.streams()

    def encode(self, layers: Sequence[LayerKV]) -> list[Tensor]:
        """Return the bytes of each layer; the coder runs on the CPU, over all layers at once."""
        require_encodable(layers)
        tokens = len(layers[0][0]) if layers else 0
        if tokens > _MAX_TOKENS:
            raise KVCacheError(f"the entropy codec takes chunks of up to {_MAX_TOKENS} tokens, got {tokens}")
        steps = [self._step_bytes(index, layer) for index, layer in enumerate(layers)]
        numbers = np.concatenate([_matrix(layer) for layer in layers], axis=1)
        all_steps = np.concatenate(steps)
        levels = np.floor(numbers / rans_tables().steps[all_steps] + np.float32(0.5)).astype(np.int32)
        means = np.rint(levels.mean(axis=0)).astype(np.int32) if tokens else np.zeros(len(all_steps), np.int32)
        predictors, residuals = choose_predictors(levels - means)
        tables = choose_tables(residuals)
        words, lengths = encode_streams(residuals, tables)
        packed = [part.astype(kind) for part, kind in ((tables | predictors << 6, "u1"), (means, "<i2"))]
        return self._packed(layers, [all_steps, *packed], words, lengths)

    def decode(self, encoded: Sequence[Tensor], tokens: int, first_layer: int = 0) -> list[LayerKV]:
        """Return keys and values of each given layer."""
        layers: list[LayerKV] = []
        for spec, run in itertools.groupby(
            enumerate(encoded, first_layer), key=lambda item: self.layout.layers[item[0]]
        ):
            parts = [self._split(index, data, tokens) for index, data in run]
            width = spec.num_kv_heads * spec.head_dim
            out = entropy_decode_kv(_joined(parts), tokens, width, self.layout.dtype)
            shaped = out.view(len(parts), 2, tokens, spec.num_kv_heads, spec.head_dim)
            layers += [(layer[0], layer[1]) for layer in shaped]
        return layers

    def error_bounds(self, layers: Sequence[LayerKV]) -> list[LayerKV]:
        """Return half of each channel's step, plus what the output type rounds."""
        bounds: list[LayerKV] = []
        for index, layer in enumerate(layers):
            steps = torch.from_numpy(rans_tables().steps[self._step_bytes(index, layer)]).to(layer[0].device)
            key_step, value_step = steps.view(2, *layer[0].shape[1:])
            dtype = self.layout.dtype
            bounds.append(
                (
                    key_step / 2 + rounding(layer[0].float().abs() + key_step, dtype) * 2,
                    value_step / 2 + rounding(layer[1].float().abs() + value_step, dtype) * 2,
                )
            )
        return bounds

    def bytes_per_token(self, tokens: int) -> float:
        """Return what to expect of Gaussian channels without any likeness of neighbours."""
        total = 0.0
        for layer, spec in enumerate(self.layout.layers):
            width = spec.num_kv_heads * spec.head_dim
            for bins in (self._level.keys, self._level.values):
                # Of a Gaussian in steps of `bins` spreads, which are rounded down by an eighth of an octave on average.
                entropy = 2.05 + 0.12 - np.log2(bins[self._third(layer)])
                total += width * (max(entropy, 0.3) * max(tokens, 1) / 8 + 4 + 6 / CHANNELS_PER_STREAM)
        return total / max(tokens, 1)

    def _third(self, layer: int) -> int:
        return 3 * layer // self.layout.num_layers

    def _step_bytes(self, index: int, layer: LayerKV) -> NDArray[np.uint8]:
        """Return (2 * width,): the step of each channel of the keys, then of the values, as its byte."""
        level, third = self._level, self._third(index)
        keys, values = (heads.float().cpu() for heads in layer)
        if len(keys) == 0:
            return np.zeros(2 * keys.shape[1] * keys.shape[2], dtype=np.uint8)
        steps = (
            level.keys[third] * _spread(keys, _KEY_SPREAD),
            level.values[third] * _spread(values, 0.0),
        )
        wanted = torch.stack(steps).clamp(min=2.0**-30)
        least = torch.stack((keys.abs().amax(0), values.abs().amax(0))).clamp(min=2.0**-30) / _MAX_LEVEL
        octaves = torch.maximum((4 * wanted.log2()).floor(), (4 * least.log2()).ceil())
        return (octaves + 128).clamp(0, 255).to(torch.uint8).flatten().numpy()

    def _packed(
        self,
        layers: Sequence[LayerKV],
        channels: Sequence[NDArray[np.generic]],
        words: NDArray[np.uint16],
        lengths: NDArray[np.int64],
    ) -> list[Tensor]:
        out, channel, stream, word = [], 0, 0, 0
        for keys, _ in layers:
            width = 2 * keys.shape[1] * keys.shape[2]
            streams = width // CHANNELS_PER_STREAM
            own = lengths[stream : stream + streams]
            count = int(own.sum())
            parts = [
                *(part[channel : channel + width] for part in channels),
                own.astype("<u2").view("<i2"),
                words[word : word + count].view("<i2"),
            ]
            out.append(join_sections([torch.from_numpy(np.ascontiguousarray(part)) for part in parts]).to(keys.device))
            channel, stream, word = channel + width, stream + streams, word + count
        return out

    def _split(self, layer: int, data: Tensor, tokens: int) -> tuple[Tensor, EntropyStreams]:
        """Return the words' lengths and the streams of one layer; `starts` count from the layer's own words."""
        spec = self.layout.layers[layer]
        sections = self.format(layer).sections(tokens, spec.num_kv_heads, spec.head_dim)
        fixed = section_bytes(sections)
        if data.numel() < fixed:
            raise KVCacheError(f"a layer's KV has {data.numel()} bytes, its channels alone take {fixed}")
        steps, tables, means, lengths = split_sections(data[:fixed], sections)
        counts = lengths.to(torch.int64) & 0xFFFF
        (words,) = split_sections(data[fixed:], [(torch.int16, (int(counts.sum()),))])
        shaped = [part.view(-1, CHANNELS_PER_STREAM) for part in (tables, means, steps)]
        return counts, EntropyStreams(words, counts.cumsum(0) - counts, *shaped)


def _joined(parts: Sequence[tuple[Tensor, EntropyStreams]]) -> EntropyStreams:
    """Return the streams of several layers as one."""
    sizes = [len(streams.words) for _, streams in parts]
    before = itertools.accumulate(sizes, initial=0)
    starts = [streams.starts + offset for (_, streams), offset in zip(parts, before, strict=False)]
    joined = [torch.cat([streams[field] for _, streams in parts]) for field in (0, 2, 3, 4)]
    return EntropyStreams(joined[0], torch.cat(starts), *joined[1:])


def _spread(heads: Tensor, own: float) -> Tensor:
    """Return (kv_heads, head_dim): root-mean-square deviation of a channel, to the power `own`, times its head's."""
    if len(heads) == 0:
        return torch.zeros(heads.shape[1:])
    variance = heads.var(0, correction=0)
    channel, head = variance.sqrt(), variance.mean(1, keepdim=True).sqrt()
    return channel**own * head ** (1 - own)


def _matrix(layer: LayerKV) -> NDArray[np.float32]:
    """Return (tokens, 2 * width): keys, then values."""
    joined = torch.cat([heads.float().flatten(1) for heads in layer], dim=1)
    matrix: NDArray[np.float32] = joined.cpu().numpy()
    return matrix
