"""The KV pool: fixed-size blocks of keys (un-rotated) and values for all layers, in the model's type."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.kvcache.block_pool import BLOCK_SIZE, BlockPool
from ragkit.kvcache.layout import KVLayout

__all__ = ["BLOCK_SIZE", "KVPool"]


class KVPool(BlockPool):
    """Blocks of keys and values that requests share.

    Keys are stored after bias and qk-norm and before RoPE, so a block serves every request and position that its
    tokens appear at.

    Attributes:
        keys, values: one (num_blocks, block_size, kv_heads, head_dim) tensor a layer.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device, block_size: int = BLOCK_SIZE) -> None:
        super().__init__(num_blocks, block_size)
        self.layout = layout
        self.device = device
        # Not cleared: on a CPU the system backs a page when it is first written, and unwritten rows are never seen.
        shapes = [(num_blocks, block_size, layer.num_kv_heads, layer.head_dim) for layer in layout.layers]
        self.keys: list[Tensor] = [torch.empty(shape, dtype=layout.dtype, device=device) for shape in shapes]
        self.values: list[Tensor] = [torch.empty(shape, dtype=layout.dtype, device=device) for shape in shapes]

    def rows(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values (tokens, kv_heads, head_dim) of one layer at `slots` (tokens,)."""
        return self.keys[layer].flatten(0, 1)[slots], self.values[layer].flatten(0, 1)[slots]
