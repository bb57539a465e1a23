"""Blocks of keys or values as codes of 8 or 4 bits: what attention reads in the place of plain numbers.

    x = code * scale + zero     (see quantize_kv)

Keys share a scale along the rows of a block, values along the channels of a row. A group never reaches over the end of
a block, so that a block is whole by itself wherever it lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.quantize_kv import QuantizedHeads, check_groups


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedBlocks:
    """Keys or values of one layer in blocks.

    Attributes:
        codes: (blocks, block_size, kv_heads, head_dim * bits / 8) uint8; of 4 bits channel d is in the low half of a
            byte and channel d + head_dim / 2 in the high half.
        scales, zeros: (blocks, block_size / row_group, kv_heads, head_dim / channel_group) fp16.
        bits: 8 or 4.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int

    def __post_init__(self) -> None:
        codes, scales = self.codes.shape, self.scales.shape
        if self.bits not in (4, 8) or self.codes.dim() != 4 or self.codes.dtype != torch.uint8:
            raise KernelInputError(
                f"codes must be (blocks, block_size, kv_heads, bytes) uint8 of 4 or 8 bits, got {tuple(codes)} "
                f"{self.codes.dtype} of {self.bits}"
            )
        fits = len(scales) == 4 and scales == self.zeros.shape and (scales[0], scales[2]) == (codes[0], codes[2])
        half = codes[3] * 4 // self.bits
        # A channel group of keys is one channel; one of values may not hold channels of both halves of a head.
        if not fits or not scales[1] or codes[1] % scales[1] or scales[3] % 2 or half % (scales[3] // 2 or 1):
            raise KernelInputError(f"scales {tuple(scales)}, {tuple(self.zeros.shape)} do not fit codes {tuple(codes)}")
        if not (self.codes.is_contiguous() and self.scales.is_contiguous() and self.zeros.is_contiguous()):
            raise KernelInputError("codes, scales and zeros must be contiguous")

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int], bits: int, row_group: int, channel_group: int, device: torch.device
    ) -> QuantizedBlocks:
        """Return unwritten blocks.

        Args:
            shape: (blocks, block_size, kv_heads, head_dim).
            bits: 8 or 4.
            row_group: rows that share a scale, a power of two that divides the block size.
            channel_group: channels that share a scale, a power of two that divides half of head_dim.
            device: where they are.

        Raises:
            KernelInputError: the groups do not fit the shape.
        """
        blocks, block_size, kv_heads, head_dim = shape
        check_groups((block_size, kv_heads, head_dim), bits, row_group, channel_group)
        if block_size % row_group:
            raise KernelInputError(f"groups of {row_group} rows do not divide blocks of {block_size}")
        codes = torch.empty((blocks, block_size, kv_heads, head_dim * bits // 8), dtype=torch.uint8, device=device)
        size = (blocks, block_size // row_group, kv_heads, head_dim // channel_group)
        scales, zeros = (torch.empty(size, dtype=torch.float16, device=device) for _ in range(2))
        return cls(codes, scales, zeros, bits)

    @property
    def shape(self) -> torch.Size:
        """(blocks, block_size, kv_heads, head_dim), as of plain blocks."""
        return torch.Size((*self.codes.shape[:3], self.codes.shape[3] * 8 // self.bits))

    @property
    def row_group(self) -> int:
        """Rows that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def channel_group(self) -> int:
        """Channels that share a scale."""
        return self.codes.shape[3] * 8 // self.bits // self.scales.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def heads(self) -> QuantizedHeads:
        """Return a view of all blocks behind each other, as `quantize_kv` writes and `dequantize_kv` reads."""
        return QuantizedHeads(self.codes.flatten(0, 1), self.scales.flatten(0, 1), self.zeros.flatten(0, 1))

    def some(self, blocks: Tensor) -> QuantizedBlocks:
        """Return a copy of the blocks that `blocks` (blocks,) int64 names: only the device needs to know them."""
        codes, scales, zeros = (part.index_select(0, blocks) for part in (self.codes, self.scales, self.zeros))
        return QuantizedBlocks(codes, scales, zeros, self.bits)

    def rows(self, slots: Tensor) -> Tensor:
        """Return (tokens, kv_heads, head_dim) fp32, the numbers at `slots` (tokens,): the definition."""
        codes, scales, zeros = self.heads()
        picked = codes[slots]
        if self.bits == 4:
            picked = torch.cat((picked & 15, picked >> 4), dim=-1)
        group = slots // self.row_group
        scale, zero = (part[group].float().repeat_interleave(self.channel_group, -1) for part in (scales, zeros))
        return picked.float() * scale + zero
