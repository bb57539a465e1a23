"""The reused KV of one prompt: prefix and chunks at their places, with room for the question's rows behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ragkit.generation.decoder import Decoder
from ragkit.kvcache.chunk_kv import EncodedKV
from ragkit.kvcache.codec import KVCodec, LayerKV
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.token_selection import ChunkSpan
from ragkit.types import Prompt, Segment


class BlendLayout:
    """How a prompt is divided: prefix | chunks | ending. The ending, where the question is, is always computed.

    A prompt that ends with a chunk has that chunk as its ending: logits follow from the last token.

    Attributes:
        chunks: the segments of the chunks that stand behind each other right after the prefix; none where they hold no
            token.
        prefix: token ids before the first chunk.
        first, stop: the chunks' positions are `first` up to `stop`.
        num_tokens: tokens of the whole prompt.
    """

    def __init__(self, prompt: Prompt) -> None:
        segments = prompt.segments
        begin = next((index for index, one in enumerate(segments) if one.chunk_id is not None), len(segments))
        end = next((index for index in range(begin, len(segments)) if segments[index].chunk_id is None), len(segments))
        while end > begin and not any(one.token_ids for one in segments[end:]):
            end -= 1
        chunks = segments[begin:end]
        self.chunks: tuple[Segment, ...] = chunks if any(one.token_ids for one in chunks) else ()
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


class RowSource(Protocol):
    """Keys (before RoPE) and values of every position, layer by layer."""

    @property
    def num_tokens(self) -> int:
        """Number of positions."""
        ...

    @property
    def draft(self) -> RowSource:
        """The rows that tokens are chosen by: a low-bit copy where the codec keeps one, else these rows."""
        ...

    def layer(self, index: int) -> LayerKV:
        """Return keys and values (num_tokens, kv_heads, head_dim) of a layer, in the model's type, on its device.

        They hold until the next call for another layer. The ending's rows are unwritten; the caller may write them.
        """
        ...

    def stored(self, index: int, pool: KVPool | None, slots: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys and values of a layer where they lie, and where each position before the ending is among them.

        None says that rows are positions, as `layer` gives them.

        Args:
            index: which layer.
            pool: what the request's rows are written to; None for another place.
            slots: (positions,) int64, the rows of the pool that they go to; those of the prefix are written already.
        """
        ...


class ReusedRows:
    """Rows of all layers in memory.

    Attributes:
        layers: keys and values (num_tokens, kv_heads, head_dim) of each layer, in the model's type, on its device.
    """

    def __init__(self, layers: Sequence[LayerKV], draft: RowSource | None = None) -> None:
        self.layers = tuple(layers)
        self.num_tokens = len(self.layers[0][0])
        self._draft = draft

    @property
    def draft(self) -> RowSource:
        """The rows that tokens are chosen by."""
        return self._draft or self

    @classmethod
    def gather(
        cls,
        decoder: Decoder,
        layout: BlendLayout,
        prefix: Sequence[LayerKV],
        chunks: Sequence[EncodedKV],
        codec: KVCodec,
    ) -> ReusedRows:
        """Return the rows of `prefix` and `chunks`, decoded and behind each other, and those of the draft with them."""
        parts = [(one.data, one.extents, one.num_tokens) for one in chunks]
        rows = cls._decoded(decoder, layout, prefix, parts, codec)
        if codec.draft is None:
            return rows
        drafts = [(one.data, one.draft_extents, one.num_tokens) for one in chunks]
        return cls(rows.layers, cls._decoded(decoder, layout, prefix, drafts, codec.draft))

    @classmethod
    def unwritten(cls, decoder: Decoder, num_tokens: int) -> ReusedRows:
        """Return rows for `num_tokens` positions, to be written."""
        return cls([unwritten_layer(decoder, layer, num_tokens) for layer in range(decoder.layout.num_layers)])

    def layer(self, index: int) -> LayerKV:
        """Return keys and values of a layer, as `RowSource` says."""
        return self.layers[index]

    def stored(self, index: int, pool: KVPool | None, slots: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the same, as `RowSource` says."""
        return *self.layers[index], None

    @classmethod
    def _decoded(
        cls,
        decoder: Decoder,
        layout: BlendLayout,
        prefix: Sequence[LayerKV],
        chunks: Sequence[tuple[Tensor, Sequence[tuple[int, int]], int]],
        codec: KVCodec,
    ) -> ReusedRows:
        rows = cls.unwritten(decoder, layout.num_tokens)
        for (keys, values), (prefix_keys, prefix_values) in zip(rows.layers, prefix, strict=True):
            keys[: layout.first], values[: layout.first] = prefix_keys, prefix_values
        start = layout.first
        for data, extents, tokens in chunks:
            stop = start + tokens
            # All layers of a chunk at once: the streams of an entropy coder are decoded side by side.
            decoded = codec.decode([data[begin:end] for begin, end in extents], tokens)
            for layer, (decoded_keys, decoded_values) in zip(rows.layers, decoded, strict=True):
                layer[0][start:stop], layer[1][start:stop] = decoded_keys, decoded_values
            start = stop
        return rows


def unwritten_layer(decoder: Decoder, layer: int, num_tokens: int) -> LayerKV:
    """Return keys and values of one layer for `num_tokens` positions, to be written."""
    spec = decoder.layout.layers[layer]
    shape = (num_tokens, spec.num_kv_heads, spec.head_dim)
    keys = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
    return keys, torch.empty_like(keys)
