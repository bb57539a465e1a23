"""Entropy-coded KV in CacheGen's manner: coarse steps, neighbour deltas, and a range coder, by layer and channel.

CacheGen (arXiv 2310.07240, section 5) found that neighbouring tokens of one layer and channel have similar keys and
values, that shallow layers bear less error than deep ones, and that statistics belong to channels. Here a channel is
cut into equal steps around its mean, keys before RoPE, as coarse as `channel_steps` allows; each level is coded as its
difference from none, half or all of the level before it, whichever is shortest for the channel, with the best of 64
fixed distributions. Four channels make a stream that decodes alone, so a chunk has thousands of them and a GPU thread
takes one each.

The mean is kept as a fraction of steps, so channels much narrower than a step are right on average over the tokens:
attention averages errors of single tokens away, but not one that all of them share. The first token is kept as it is:
where a chunk was computed alone, it takes in the attention that goes nowhere, and any error in it is in every answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kernels.entropy_decode_kv import EntropyStreams, entropy_decode_kv
from ragkit.kernels.placement_table import ChunkFormat
from ragkit.kernels.rans_tables import CHANNELS_PER_STREAM, rans_tables, tables_digest
from ragkit.kvcache.channel_steps import channel_steps, relative_steps
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
_VERSION = 2  # of what the bytes mean

# Coarseness of the steps. The first has about the KL of 4-bit codes, the last is as coarse as CacheGen's default.
LEVELS = {1: 0.5, 2: 0.8, 3: 1.25}


class EntropyCodec:
    """Keys and values as entropy-coded steps; level 1 is the finest."""

    def __init__(self, name: str, layout: KVLayout, level: int) -> None:
        if any(spec.num_kv_heads * spec.head_dim % CHANNELS_PER_STREAM for spec in layout.layers):
            raise KVCacheError(f"the entropy codec takes {CHANNELS_PER_STREAM} channels at a time: head_dim must fit")
        self.codec_id = f"{name}-v{_VERSION}-{tables_digest()}"
        self.layout = layout
        self.draft = None
        self._coarseness = LEVELS[level]

    def format(self, layer: int) -> ChunkFormat:
        """Return streams."""
        return ChunkFormat.streams()

    def encode(self, layers: Sequence[LayerKV]) -> list[Tensor]:
        """Return the bytes of each layer; the coder runs on the CPU, over all layers at once."""
        require_encodable(layers)
        tokens = len(layers[0][0]) if layers else 0
        if tokens > _MAX_TOKENS:
            raise KVCacheError(f"the entropy codec takes chunks of up to {_MAX_TOKENS} tokens, got {tokens}")
        steps = np.concatenate([part.flatten().numpy() for part in self._step_bytes(layers)])
        matrix = np.concatenate([_matrix(layer) for layer in layers], axis=1)
        firsts = (matrix[0] if tokens else np.zeros(len(steps))).astype("<f2")
        numbers = matrix[1:] / rans_tables().steps[steps]
        means = numbers.mean(axis=0).astype("<f2") if tokens > 1 else np.zeros(len(steps), "<f2")
        levels = np.floor(numbers - means.astype(np.float32) + np.float32(0.5)).astype(np.int32)
        predictors, residuals = choose_predictors(levels)
        tables = choose_tables(residuals)
        words, lengths = encode_streams(residuals, tables)
        channels = [steps, (tables | predictors << 6).astype("u1"), means, firsts]
        return self._packed(layers, channels, words, lengths)

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
        """Return half of each channel's step, for the first token fp16's rounding, plus what the output type rounds."""
        bounds: list[LayerKV] = []
        for layer, octaves in zip(layers, self._step_bytes(layers), strict=True):
            key_step, value_step = torch.from_numpy(rans_tables().steps[octaves.numpy()]).to(layer[0].device)
            bounds.append((self._bound(layer[0].float(), key_step), self._bound(layer[1].float(), value_step)))
        return bounds

    def bytes_per_token(self, tokens: int) -> float:
        """Return what to expect of Gaussian channels without any likeness of neighbours."""
        total, num_layers = 0.0, self.layout.num_layers
        for layer, spec in enumerate(self.layout.layers):
            keys, values = relative_steps(layer, num_layers, spec.head_dim, self._coarseness)
            bits = sum(_gaussian_bits(step) for step in keys.tolist()) / spec.head_dim + _gaussian_bits(values)
            width = spec.num_kv_heads * spec.head_dim
            total += width * (bits * max(tokens - 1, 0) / 8 + 2 * (6 + 6 / CHANNELS_PER_STREAM))
        return total / max(tokens, 1)

    def _bound(self, heads: Tensor, step: Tensor) -> Tensor:
        bound = step / 2 + rounding(heads.abs() + step, self.layout.dtype) * 2
        bound[:1] = rounding(heads[:1], torch.float16) + rounding(heads[:1], self.layout.dtype) * 2
        return bound

    def _step_bytes(self, layers: Sequence[LayerKV]) -> list[Tensor]:
        """Return for each layer (2, kv_heads, head_dim) uint8: the step of each channel as its byte."""
        found = []
        coded = [(keys[1:], values[1:]) for keys, values in layers]
        for layer, wanted in zip(coded, channel_steps(coded, self._coarseness), strict=True):
            if len(layer[0]) == 0:
                found.append(torch.zeros(wanted.shape, dtype=torch.uint8))
                continue
            largest = torch.stack([heads.float().cpu().abs().amax(0) for heads in layer])
            least = (4 * (largest / _MAX_LEVEL).clamp(min=2.0**-30).log2()).ceil()
            octaves = torch.maximum((4 * wanted.clamp(min=2.0**-30).log2()).round(), least)
            found.append((octaves + 128).clamp(0, 255).to(torch.uint8))
        return found

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
        steps, tables, means, firsts, lengths = split_sections(data[:fixed], sections)
        counts = lengths.to(torch.int64) & 0xFFFF
        (words,) = split_sections(data[fixed:], [(torch.int16, (int(counts.sum()),))])
        shaped = [part.view(-1, CHANNELS_PER_STREAM) for part in (tables, means, steps, firsts)]
        return counts, EntropyStreams(words, counts.cumsum(0) - counts, *shaped)


def _joined(parts: Sequence[tuple[Tensor, EntropyStreams]]) -> EntropyStreams:
    """Return the streams of several layers as one."""
    sizes = [len(streams.words) for _, streams in parts]
    before = itertools.accumulate(sizes, initial=0)
    starts = [streams.starts + offset for (_, streams), offset in zip(parts, before, strict=False)]
    joined = [torch.cat([streams[field] for _, streams in parts]) for field in (0, 2, 3, 4, 5)]
    return EntropyStreams(joined[0], torch.cat(starts), *joined[1:])


def _gaussian_bits(step: float) -> float:
    """Return the entropy of a standard Gaussian in steps around its mean."""
    bits, edge = 0.0, -0.5
    while edge * step < 9:
        part = (math.erfc(edge * step / math.sqrt(2)) - math.erfc((edge + 1) * step / math.sqrt(2))) / 2
        bits -= (1 if edge < 0 else 2) * part * math.log2(max(part, 1e-30))
        edge += 1
    return bits


def _matrix(layer: LayerKV) -> NDArray[np.float32]:
    """Return (tokens, 2 * width): keys, then values."""
    joined = torch.cat([heads.float().flatten(1) for heads in layer], dim=1)
    matrix: NDArray[np.float32] = joined.cpu().numpy()
    return matrix
