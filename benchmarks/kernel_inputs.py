"""What the cases of `benchmarks/kernels` share: the shape of Llama 3 8B, random inputs of it, and baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks

BLOCK_SIZE = 64
CODE_GROUPS = {8: 64, 4: 32}  # numbers that share a scale, by the bits of a code: those of the int8 and int4 codecs


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one layer, and the type of its numbers."""

    hidden_size: int
    intermediate_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys of one token, or of its values."""
        return self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def heads(self) -> str:
        """The heads, for a table."""
        return f"{self.q_heads}/{self.kv_heads} heads of {self.head_dim}"


def model_shape(device: torch.device) -> ModelShape:
    """Return the shape of Llama 3 8B in bf16 on a GPU; a small one in fp32 on a CPU, where kernels are interpreted."""
    if device.type == "cpu":
        return ModelShape(128, 200, 4, 2, 32, torch.float32)
    return ModelShape(4096, 14336, 32, 8, 128, torch.bfloat16)


def normal(*size: int, shape: ModelShape, device: torch.device) -> Tensor:
    """Return normal numbers in the type of `shape`."""
    return torch.randn(size, device=device).to(shape.dtype)


def kv_rows(rows: int, shape: ModelShape, device: torch.device) -> Tensor:
    """Return (rows, kv_heads, head_dim) normal numbers."""
    return normal(rows, shape.kv_heads, shape.head_dim, shape=shape, device=device)


def empty_pool(rows: int, shape: ModelShape, device: torch.device) -> Tensor:
    """Return (blocks, block_size, kv_heads, head_dim) of unwritten rows, `rows` of them or a few more."""
    blocks = -(-rows // BLOCK_SIZE)
    return torch.empty(blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim, device=device, dtype=shape.dtype)


def quantized(keys: Tensor, values: Tensor, bits: int) -> tuple[QuantizedBlocks, QuantizedBlocks]:
    """Return pools of keys and values (blocks, block_size, kv_heads, head_dim) as codes in the codecs' groups."""
    group = CODE_GROUPS[bits]
    pools = []
    for pool, groups in ((keys, (group, 1)), (values, (1, min(group, keys.shape[3] // 2)))):
        codes = QuantizedBlocks.empty(pool.shape, bits, *groups, pool.device)
        slots = torch.arange(codes.scales.shape[0] * codes.scales.shape[1], device=pool.device)
        quantize_kv(
            pool.flatten(0, 1), bits=bits, token_group=groups[0], channel_group=groups[1],
            out=codes.heads(), slots=slots,
        )  # fmt: skip
        pools.append(codes)
    return pools[0], pools[1]


def scattered_blocks(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return blocks in random order (blocks,) int32, and the slots of `rows` rows (rows,) int64 behind each other."""
    blocks = torch.randperm(-(-rows // BLOCK_SIZE), device=device)
    slots = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)).flatten()[:rows]
    return blocks.int(), slots.contiguous()


def rotary_tables(positions: int, shape: ModelShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (positions, head_dim / 2) fp32 with the base frequency of Llama 3."""
    frequencies = 5e5 ** -(torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = torch.outer(torch.arange(positions, device=device).float(), frequencies)
    return angles.cos(), angles.sin()


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `heads` (tokens, heads, head_dim) turned by `cos`, `sin` (tokens, head_dim / 2), for baselines."""
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def compiled(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return `function` compiled on a GPU, itself on a CPU."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function
