"""How many bytes chunk KV takes, from sizes alone: a status query should not have to load torch for it."""

from __future__ import annotations

from ragkit.config import CodecName
from ragkit.models.model_config import ModelConfig

_RAW = {CodecName.FP32: 4, CodecName.BF16: 2, CodecName.FP16: 2}  # bytes of a number
_QUANTIZED = {CodecName.INT8: (8, 64), CodecName.INT4: (4, 32)}  # bits of a number, and numbers that share a scale
_SCALE = 4  # bytes of a group's scale and zero
_ENTROPY = {CodecName.ENTROPY1: 0.90, CodecName.ENTROPY2: 0.74, CodecName.ENTROPY3: 0.59}  # as the codec expects
_RECORD = 6144  # bytes of a record's header and padding, on average


def estimated_kv_bytes(codec: CodecName, config: ModelConfig, chunks: int, tokens: int) -> int:
    """Return about how many bytes of disk the KV of `chunks` chunks with `tokens` tokens together takes."""
    width = config.num_layers * config.num_kv_heads * config.head_dim
    return int(tokens * width * _bytes_per_channel(codec, config.head_dim)) + chunks * _RECORD


def _bytes_per_channel(codec: CodecName, head_dim: int) -> float:
    """Return the bytes that one key and one value take."""
    if "+" in codec.value:  # one codec beside another
        return sum(_bytes_per_channel(CodecName(part), head_dim) for part in codec.value.split("+"))
    if codec in _RAW:
        return 2.0 * _RAW[codec]
    if codec in _QUANTIZED:
        bits, group = _QUANTIZED[codec]
        half = head_dim // 2
        return 2 * bits / 8 + _SCALE / group + _SCALE / min(group, half & -half)
    return _ENTROPY[codec]
