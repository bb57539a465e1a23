"""The codecs by name."""

from __future__ import annotations

import torch

from ragkit.config import CodecName
from ragkit.errors import KVCacheError
from ragkit.kvcache.codec import KVCodec
from ragkit.kvcache.codec_drafted import DraftedCodec
from ragkit.kvcache.codec_entropy import EntropyCodec
from ragkit.kvcache.codec_quantized import QuantizedCodec
from ragkit.kvcache.codec_raw import RawCodec
from ragkit.kvcache.layout import KVLayout

_RAW = {CodecName.FP32: torch.float32, CodecName.BF16: torch.bfloat16, CodecName.FP16: torch.float16}
_QUANTIZED = {CodecName.INT8: (8, 64), CodecName.INT4: (4, 32)}  # bits and group; 32 is KIVI's for 4 bits
_ENTROPY = {CodecName.ENTROPY1: 1, CodecName.ENTROPY2: 2, CodecName.ENTROPY3: 3}

_ENTROPY_ENCODING_S = 2e-7  # a number, by one core; the others take next to nothing

_DRAFTED = {  # the draft, and what is used
    CodecName.INT4_BF16: (CodecName.INT4, CodecName.BF16),
    CodecName.INT4_INT8: (CodecName.INT4, CodecName.INT8),
}


def make_codec(name: str, layout: KVLayout) -> KVCodec:
    """Return the codec `name` for KV of `layout`.

    Raises:
        KVCacheError: there is no such codec, or it cannot take this shape.
    """
    if name not in list(CodecName):
        raise KVCacheError(f"there is no KV codec {name!r}; there are {', '.join(CodecName)}")
    known = CodecName(name)
    if known in _RAW:
        return RawCodec(known.value, layout, _RAW[known])
    if known in _QUANTIZED:
        bits, group = _QUANTIZED[known]
        return QuantizedCodec(known.value, layout, bits, group)
    if known in _DRAFTED:
        return DraftedCodec(*(make_codec(part, layout) for part in _DRAFTED[known]))
    return EntropyCodec(known.value, layout, _ENTROPY[known])


def encoding_seconds(name: str) -> float:
    """Return what the codec `name` may take to encode one number, before it was measured."""
    return _ENTROPY_ENCODING_S if name in _ENTROPY else 0.0
