"""What a KV codec promises, and the pieces that codecs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kernels.placement_table import SECTION_ALIGNMENT, ChunkFormat, Section
from ragkit.kvcache.chunk_kv import ChunkKV, ChunkRef, EncodedKV
from ragkit.kvcache.layout import KVLayout

LayerKV = tuple[Tensor, Tensor]  # keys before RoPE and values, (tokens, kv_heads, head_dim) each

_PARTS = ("keys", "values")
_LARGEST = 6e4  # numbers, or their scales and zeros, are fp16


class KVCodec(Protocol):
    """Turns the KV of a chunk's layers into bytes and back, on the device where they are.

    Decoding gives the same numbers for the same bytes on every call, and a chunk passes through its codec before its
    first use, so whoever computes a chunk and whoever loads it see equal values.
    """

    @property
    def codec_id(self) -> str:
        """Names the codec with everything that changes its numbers; part of the KV key."""
        ...

    @property
    def layout(self) -> KVLayout:
        """The layers that it is made for; decoding gives the layout's dtype."""
        ...

    @property
    def draft(self) -> KVCodec | None:
        """The codec of a low-bit copy that stands before the layers of every chunk; None for no such copy.

        Tokens are chosen by the draft, which is there sooner, and recomputed over the layers themselves.
        """
        ...

    def format(self, layer: int) -> ChunkFormat:
        """Return how `place_chunks` reads the bytes of a layer where they lie."""
        ...

    def encode(self, layers: Sequence[LayerKV]) -> list[Tensor]:
        """Return the bytes (uint8) of each layer of a whole chunk, without the draft.

        Raises:
            KVCacheError: a number is not finite, or too large for the codec.
        """
        ...

    def decode(self, encoded: Sequence[Tensor], tokens: int, first_layer: int = 0) -> list[LayerKV]:
        """Return the keys and values of the layers from `first_layer` on whose bytes are given."""
        ...

    def error_bounds(self, layers: Sequence[LayerKV]) -> list[LayerKV]:
        """Return for every number of `layers` how far the decoded one may be from it, fp32."""
        ...

    def bytes_per_token(self, tokens: int) -> float:
        """Return the bytes a token takes in a chunk of `tokens`: exact for fixed-size codecs, else what to expect."""
        ...


def encode_chunk(codec: KVCodec, chunk: ChunkKV, chunk_id: str, recompute_ms: float = 0.0) -> EncodedKV:
    """Return `chunk` as `codec` stores it.

    Raises:
        KVCacheError: its shape is not the codec's, or a number is not finite.
    """
    expected = [(spec.num_kv_heads, spec.head_dim) for spec in codec.layout.layers]
    if [tuple(keys.shape[1:]) for keys, _ in chunk.layers] != expected:
        raise KVCacheError(f"the KV of {chunk.key} does not have the layers of the model that its codec is for")
    ref = ChunkRef(chunk.key, chunk.token_ids, chunk_id)
    draft = codec.draft.encode(chunk.layers) if codec.draft else []
    return EncodedKV.pack(ref, codec.codec_id, codec.encode(chunk.layers), recompute_ms, draft)


def decode_chunk(codec: KVCodec, encoded: EncodedKV) -> ChunkKV:
    """Return the chunk that `encoded` holds.

    Raises:
        KVCacheError: another codec made it.
    """
    if encoded.codec_id != codec.codec_id:
        raise KVCacheError(f"KV encoded by {encoded.codec_id} cannot be decoded by {codec.codec_id}")
    layers = [encoded.layer(index) for index in range(len(encoded.extents))]
    return ChunkKV(encoded.ref.key, encoded.ref.token_ids, tuple(codec.decode(layers, encoded.num_tokens)))


def require_encodable(layers: Sequence[LayerKV]) -> None:
    """Raise `KVCacheError` if a number is not finite or beyond what fp16 carries."""
    parts = [
        (index, name, heads) for index, layer in enumerate(layers) for name, heads in zip(_PARTS, layer, strict=True)
    ]
    parts = [part for part in parts if part[2].numel()]
    if not parts:
        return
    peaks = torch.stack([heads.abs().amax() for _, _, heads in parts]).tolist()  # all at once: a GPU is asked once
    for (index, name, _), peak in zip(parts, peaks, strict=True):
        if not peak <= _LARGEST:  # written so that NaN fails, too
            raise KVCacheError(
                f"the {name} of layer {index} hold a number that is not finite or above {_LARGEST:g}: "
                "this codec cannot store such KV, set kv.codec to bf16 or fp32"
            )


def section_bytes(sections: Sequence[Section]) -> int:
    """Return the bytes of aligned `sections` behind each other."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for dtype, shape in sections)


def join_sections(parts: Sequence[Tensor]) -> Tensor:
    """Return (bytes,) uint8: the contiguous `parts` behind each other, aligned."""
    out = torch.zeros(sum(_aligned(part.nbytes) for part in parts), dtype=torch.uint8, device=parts[0].device)
    start = 0
    for part in parts:
        out[start : start + part.nbytes] = part.contiguous().flatten().view(torch.uint8)
        start += _aligned(part.nbytes)
    return out


def join_sections_of_layers(parts: Sequence[Tensor], num_layers: int) -> list[Tensor]:
    """Return what `join_sections` returns for each of `num_layers` layers, whose heads stand side by side in `parts`.

    Args:
        parts: (rows, num_layers * heads, numbers) each, with as many rows in all layers.
        num_layers: how many.
    """
    sections = [part.unflatten(1, (num_layers, -1)).movedim(1, 0).flatten(1).view(torch.uint8) for part in parts]
    total = sum(_aligned(section.shape[1]) for section in sections)
    out = torch.zeros((num_layers, total), dtype=torch.uint8, device=parts[0].device)
    start = 0
    for section in sections:
        out[:, start : start + section.shape[1]] = section
        start += _aligned(section.shape[1])
    return list(out.unbind(0))


def split_sections(data: Tensor, sections: Sequence[Section]) -> list[Tensor]:
    """Return views of what `join_sections` joined.

    Raises:
        KVCacheError: `data` has another size.
    """
    if data.numel() != section_bytes(sections):
        raise KVCacheError(f"a layer's KV has {data.numel()} bytes where {section_bytes(sections)} were written")
    parts, start = [], 0
    for dtype, shape in sections:
        stop = start + math.prod(shape) * dtype.itemsize
        parts.append(data[start:stop].view(dtype).view(shape))
        start += _aligned(stop - start)
    return parts


def rounding(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far rounding to `dtype` and computing in fp32 may move numbers of this size, fp32."""
    info = torch.finfo(dtype)
    relative = info.eps / 2 + torch.finfo(torch.float32).eps
    return numbers.float().abs() * relative + info.smallest_normal * info.eps


def _aligned(count: int) -> int:
    return -(-count // SECTION_ALIGNMENT) * SECTION_ALIGNMENT
