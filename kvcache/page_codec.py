"""Pages of keys and values as bytes: every page of a layer takes the same number, so one is read where it lies.

The numbers are those of the chunk codecs: raw in a float type, or codes of 8 or 4 bits with the groups of
`QuantizedCodec` (keys along the tokens of a page, values along the channels), so that a page can be placed in a block
of `QuantizedPool` as it is. What was encoded once gives the same numbers wherever and however often it is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.config import PAGE_CODECS, CodecName
from ragkit.errors import KVCacheError
from ragkit.kernels.dequantize_kv import dequantize_kv
from ragkit.kernels.quantize_kv import QuantizedHeads, quantize_kv
from ragkit.kvcache.codec import LayerKV, require_encodable
from ragkit.kvcache.codec_quantized import value_channels
from ragkit.kvcache.layout import KVLayout

_RAW = {CodecName.FP32: torch.float32, CodecName.BF16: torch.bfloat16, CodecName.FP16: torch.float16}
_QUANTIZED = {CodecName.INT8: (8, 64), CodecName.INT4: (4, 32)}  # bits, and tokens that share a scale at most

NOT_FINITE = (
    "keys or values hold a number that is not finite or too large for scales of fp16: this KV cannot be stored by a "
    "low-bit codec, take pages.codec = bf16"
)

_Section = tuple[torch.dtype, tuple[int, ...]]


class PageCodec:
    """Encodes and decodes whole pages of one layer, all at once.

    Args:
        name: one of `PAGE_CODECS`.
        layout: the model's layers; decoding gives its type.
        page_size: tokens of a page, a power of two.
        with_received: whether the attention that rows received is stored beside them, as fp16.

    Raises:
        KVCacheError: there is no such codec for pages, or the page's size is none.

    Attributes:
        codec_id: names the codec with everything that changes its bytes.
        bits: of a code; 0 where numbers are stored raw.
        group: tokens that share a scale.
    """

    def __init__(self, name: str, layout: KVLayout, page_size: int, *, with_received: bool = False) -> None:
        if name not in PAGE_CODECS:
            raise KVCacheError(f"pages cannot be stored by the codec {name!r}; take one of {', '.join(PAGE_CODECS)}")
        if page_size < 8 or page_size & (page_size - 1):
            raise KVCacheError(f"pages have a power of two of tokens, at least 8, got {page_size}")
        self.layout = layout
        self.page_size = page_size
        self.with_received = with_received
        self._raw = _RAW.get(CodecName(name))
        self.bits, most = _QUANTIZED.get(CodecName(name), (0, page_size))
        self.group = min(most, page_size)
        self.codec_id = f"page{page_size}-{name}" + ("-received" if with_received else "")

    def page_bytes(self, layer: int) -> int:
        """Return the bytes that a page of `layer` takes."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._sections(layer))

    @property
    def bytes_per_page(self) -> int:
        """Bytes that a page takes in all layers."""
        return sum(self.page_bytes(layer) for layer in range(self.layout.num_layers))

    def encode(self, layer: int, keys: Tensor, values: Tensor, received: Tensor | None = None) -> Tensor:
        """Return (pages, page_bytes) uint8.

        Args:
            layer: index of the layer.
            keys, values: (tokens, kv_heads, head_dim), keys before RoPE; a last page that is not full is filled with
                its last row, which changes no scale.
            received: (tokens, kv_heads) fp32, where the codec stores it.

        Raises:
            KVCacheError: a number is not finite, or too large for the codec.
        """
        if self._raw is None:
            require_encodable([(keys, values)])
        pages = -(-len(keys) // self.page_size)
        keys, values = self.filled(keys), self.filled(values)
        parts = [keys.to(self._raw), values.to(self._raw)] if self._raw is not None else self.quantized(keys, values)
        if self.with_received:
            assert received is not None, "the codec stores what rows received"
            parts.append(self.filled(received.unsqueeze(2)).half())
        return torch.cat([_bytes(part).view(pages, -1) for part in parts], dim=1)

    def decode(self, layer: int, data: Tensor) -> LayerKV:
        """Return keys and values (pages, page_size, kv_heads, head_dim) of (pages, page_bytes) uint8."""
        spec = self.layout.layers[layer]
        shape = (len(data), self.page_size, spec.num_kv_heads, spec.head_dim)
        parts = self._split(layer, data)
        if self._raw is not None:
            return parts[0].view(shape).to(self.layout.dtype), parts[1].view(shape).to(self.layout.dtype)
        out = torch.empty((2, len(data) * self.page_size, *shape[2:]), dtype=self.layout.dtype, device=data.device)
        keys, values = self.codes(layer, data)
        dequantize_kv(keys, out[0], token_group=self.group)
        dequantize_kv(values, out[1], token_group=1)
        return out[0].view(shape), out[1].view(shape)

    def decode_keys(self, layer: int, data: Tensor) -> Tensor:
        """Return the keys alone, as `decode` does."""
        spec = self.layout.layers[layer]
        shape = (len(data), self.page_size, spec.num_kv_heads, spec.head_dim)
        if self._raw is not None:
            return self._split(layer, data, most=1)[0].view(shape).to(self.layout.dtype)
        out = torch.empty((len(data) * self.page_size, *shape[2:]), dtype=self.layout.dtype, device=data.device)
        parts = [part.flatten(0, 1) for part in self._split(layer, data, most=3)]
        dequantize_kv(QuantizedHeads(*parts), out, token_group=self.group)
        return out.view(shape)

    def join(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Write codes, scales and zeros of keys and values (pages, ...) as encoded pages: `out` (pages, page_bytes)."""
        torch.cat([_bytes(part).view(len(out), -1) for part in parts], dim=1, out=out)

    def require_finite(self, layer: int, data: Tensor) -> None:
        """Raise `KVCacheError` where encoded pages were no numbers: then a scale or a zero of their codes is none."""
        start = 0
        for dtype, shape in self._sections(layer):
            stop = start + math.prod(shape) * dtype.itemsize
            if dtype == torch.float16 and not bool(data[:, start:stop].view(dtype).isfinite().all()):
                raise KVCacheError(NOT_FINITE)
            start = stop

    def codes(self, layer: int, data: Tensor) -> tuple[QuantizedHeads, QuantizedHeads]:
        """Return keys and values of (pages, page_bytes) uint8 as codes of their tokens behind each other."""
        parts = [part.flatten(0, 1) for part in self._split(layer, data)]
        return QuantizedHeads(*parts[:3]), QuantizedHeads(*parts[3:6])

    def received(self, layer: int, data: Tensor) -> Tensor | None:
        """Return (pages, page_size, kv_heads) fp32, the attention that rows received; None where it is not stored."""
        return self._split(layer, data)[-1].squeeze(3).float() if self.with_received else None

    def quantized(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Return codes, scales and zeros of the keys and of the values, whole pages of (tokens, kv_heads, head_dim)."""
        channels = value_channels(values.shape[2], self.group)
        key_codes = quantize_kv(keys, bits=self.bits, token_group=self.group, channel_group=1)
        value_codes = quantize_kv(values, bits=self.bits, token_group=1, channel_group=channels)
        return [*key_codes, *value_codes]

    def _split(self, layer: int, data: Tensor, most: int | None = None) -> list[Tensor]:
        """Return the first `most` sections (pages, *shape) of encoded pages, contiguous."""
        if data.shape[1] != self.page_bytes(layer):
            raise KVCacheError(
                f"a page of layer {layer} has {data.shape[1]} bytes where {self.page_bytes(layer)} were written"
            )
        parts, start = [], 0
        for dtype, shape in self._sections(layer)[:most]:
            stop = start + math.prod(shape) * dtype.itemsize
            parts.append(data[:, start:stop].contiguous().view(dtype).view(len(data), *shape))
            start = stop
        return parts

    def _sections(self, layer: int) -> list[_Section]:
        spec = self.layout.layers[layer]
        heads, dim, size = spec.num_kv_heads, spec.head_dim, self.page_size
        sections: list[_Section]
        if self._raw is not None:
            sections = [(self._raw, (size, heads, dim))] * 2
        else:
            packed = (torch.uint8, (size, heads, dim * self.bits // 8))
            key_group = (torch.float16, (size // self.group, heads, dim))
            value_group = (torch.float16, (size, heads, dim // value_channels(dim, self.group)))
            sections = [packed, key_group, key_group, packed, value_group, value_group]
        return [*sections, (torch.float16, (size, heads, 1))] if self.with_received else sections

    def filled(self, rows: Tensor) -> Tensor:
        """Return rows (tokens, ...), contiguous, the last of them again where the last page would not be full."""
        missing = -len(rows) % self.page_size
        if missing == 0:
            return rows.contiguous()
        filled = functional.pad(rows.flatten(1).T, (0, missing), mode="replicate").T
        return filled.reshape(-1, *rows.shape[1:]).contiguous()


def _bytes(part: Tensor) -> Tensor:
    return part.contiguous().flatten().view(torch.uint8)
