"""The reused KV of one prompt: prefix and chunks at their places, with room for the question's rows behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ragkit.generation.decoder import Decoder
from ragkit.kvcache.chunk_kv import EncodedKV
from ragkit.kvcache.codec import KVCodec, LayerKV
from ragkit.kvcache.token_selection import ChunkSpan
from ragkit.types import Prompt, Segment


class BlendLayout:
    """How a prompt is divided: prefix | chunks | ending. The ending, where the question is, is always computed.

    Attributes:
        chunks: the segments of the chunks that stand behind each other right after the prefix.
        prefix: token ids before the first chunk.
        first, stop: the chunks' positions are `first` up to `stop`.
        num_tokens: tokens of the whole prompt.
    """

    def __init__(self, prompt: Prompt) -> None:
        segments = prompt.segments
        begin = next((index for index, one in enumerate(segments) if one.chunk_id is not None), len(segments))
        end = next((index for index in range(begin, len(segments)) if segments[index].chunk_id is None), len(segments))
        self.chunks: tuple[Segment, ...] = segments[begin:end]
        self.prefix = tuple(token for one in segments[:begin] for token in one.token_ids)
        self.first = len(self.prefix)
        self.stop = self.first + sum(len(one.token_ids) for one in self.chunks)
        self.num_tokens = len(prompt)

    def spans(self, first_is_exact: bool) -> tuple[ChunkSpan, ...]:
        """Return where the chunks stand."""
        spans, start = [], self.first
        for index, segment in enumerate(self.chunks):
            stop = start + len(segment.token_ids)
            spans.append(ChunkSpan(start, stop, first_is_exact and index == 0))
            start = stop
        return tuple(spans)


class ReusedRows:
    """Keys (before RoPE) and values of every position and layer; those of the ending are not written yet.

    Attributes:
        layers: keys and values (num_tokens, kv_heads, head_dim) of each layer, in the model's type, on its device.
    """

    def __init__(self, layers: Sequence[LayerKV]) -> None:
        self.layers = tuple(layers)

    @classmethod
    def gather(
        cls,
        decoder: Decoder,
        layout: BlendLayout,
        prefix: Sequence[LayerKV],
        chunks: Sequence[EncodedKV],
        codec: KVCodec,
    ) -> ReusedRows:
        """Return the rows of `prefix` and `chunks`, decoded and behind each other."""
        layers = []
        # On a GPU the encoded bytes go up first, so that they are decoded there.
        data = [chunk.data.to(decoder.device, non_blocking=True) for chunk in chunks]
        for index, spec in enumerate(decoder.layout.layers):
            shape = (layout.num_tokens, spec.num_kv_heads, spec.head_dim)
            keys = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
            values = torch.empty_like(keys)
            keys[: layout.first], values[: layout.first] = prefix[index]
            start = layout.first
            for chunk, content in zip(chunks, data, strict=True):
                begin, end = chunk.extents[index]
                stop = start + chunk.num_tokens
                (decoded,) = codec.decode([content[begin:end]], chunk.num_tokens, index)
                keys[start:stop], values[start:stop] = decoded
                start = stop
            layers.append((keys, values))
        return cls(layers)

    def empty_like(self) -> ReusedRows:
        """Return unwritten rows of the same shape."""
        return ReusedRows([(torch.empty_like(keys), torch.empty_like(values)) for keys, values in self.layers])
