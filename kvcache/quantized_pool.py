"""The KV pool in 8 or 4 bits: blocks that attention reads as they are, for two to four times the rows in a memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kernels.backend import Backend
from ragkit.kernels.quantize_kv import QuantizedHeads, quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kvcache.block_pool import BLOCK_SIZE, BlockPool
from ragkit.kvcache.codec_quantized import value_channels
from ragkit.kvcache.layout import KVLayout


class QuantizedPool(BlockPool):
    """Blocks of keys and values as codes that requests share.

    Keys are stored before RoPE, `group` rows of one channel with a scale and a zero; values by up to `group` channels
    of one row. These are the groups of `QuantizedCodec`: rows written into blocks and rows stored by the codec of the
    same bits and group have the same codes. Rows share their scale, so what is written is whole blocks, once.

    Attributes:
        keys, values: the blocks of each layer.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device,
        *,
        bits: int,
        group: int,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.layout = layout
        self.device = device
        self.bits = bits
        self.group = group
        shapes = [(num_blocks, block_size, layer.num_kv_heads, layer.head_dim) for layer in layout.layers]
        self.keys = [QuantizedBlocks.empty(shape, bits, group, 1, device) for shape in shapes]
        self.values = [
            QuantizedBlocks.empty(shape, bits, 1, value_channels(shape[3], group), device) for shape in shapes
        ]

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes in all layers, with its scales."""
        total = sum(part.nbytes for part in (*self.keys, *self.values))
        return total // self.num_blocks if self.num_blocks else 0

    def write(
        self, layer: int, blocks: Tensor, keys: Tensor, values: Tensor, *, backend: Backend | None = None
    ) -> None:
        """Quantise rows into `blocks`, from the first row of the first block on; nothing waits for the device.

        Args:
            layer: which layer.
            blocks: (blocks_for(tokens),) int64 on the pool's device, distinct.
            keys: (tokens, kv_heads, head_dim) before RoPE; heads of a token contiguous.
            values: like `keys`.
            backend: an implementation to insist on.

        Raises:
            KVCacheError: so many rows do not take so many blocks.
            KernelInputError: the rows are of another shape than the layer's.
        """
        self.write_groups(layer, self.group_slots(blocks, len(keys)), keys, values, backend=backend)

    def write_groups(
        self,
        layer: int,
        slots: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        *,
        backend: Backend | None = None,
    ) -> None:
        """Quantise rows as `write` does, where `group_slots` says: the same for all layers, it is asked once for all.

        Raises:
            KernelInputError: the rows are of another shape than the layer's, or have other groups than the slots.
        """
        sides = ((keys, self.keys[layer]), (values, self.values[layer]))
        for (heads, target), at in zip(sides, slots, strict=True):
            quantize_kv(
                heads, bits=self.bits, token_group=target.row_group, channel_group=target.channel_group,
                out=target.heads(), slots=at, backend=backend,
            )  # fmt: skip

    def place(self, layer: int, blocks: Tensor, keys: QuantizedHeads, values: QuantizedHeads) -> None:
        """Put rows that are codes already into `blocks`, as `write` does, such as those that the codec has stored.

        Args:
            layer: which layer.
            blocks: (blocks_for(tokens),) int64 on the pool's device, distinct.
            keys, values: in the pool's groups, for instance `QuantizedCodec.views` of one layer of a chunk.

        Raises:
            KVCacheError: so many rows do not take so many blocks, or their groups are not the pool's.
        """
        key_slots, value_slots = self.group_slots(blocks, len(keys.codes))
        rows = self._rows(blocks, len(keys.codes))
        for heads, pool, slots in ((keys, self.keys[layer], key_slots), (values, self.values[layer], value_slots)):
            target = pool.heads()
            for part, of_pool, at in zip(heads, target, (rows, slots, slots), strict=True):
                if part.shape != (len(at), *of_pool.shape[1:]):
                    raise KVCacheError(
                        f"codes {tuple(part.shape)} do not fit blocks of {self.bits} bits in groups of {self.group}: "
                        f"expected {(len(at), *of_pool.shape[1:])}; store and read them with the same codec"
                    )
                of_pool[at] = part

    def rows(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (tokens, kv_heads, head_dim) of one layer at `slots`, in the layout's type."""
        dtype = self.layout.dtype
        return self.keys[layer].rows(slots).to(dtype), self.values[layer].rows(slots).to(dtype)

    def group_slots(self, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return which groups of a layer the rows' groups are: of the keys, and of the values, a row each.

        Args:
            blocks: (blocks_for(tokens),) int64 on the pool's device, distinct.
            tokens: rows, from the first one of the first block on.

        Raises:
            KVCacheError: so many rows do not take so many blocks.
        """
        if blocks.shape != (self.blocks_for(tokens),):
            raise KVCacheError(f"{tokens} rows take {self.blocks_for(tokens)} blocks, got {tuple(blocks.shape)}")
        per_block = self.block_size // self.group
        groups = (blocks.unsqueeze(1) * per_block + torch.arange(per_block, device=blocks.device)).flatten()
        return groups[: -(-tokens // self.group)], self._rows(blocks, tokens)

    def _rows(self, blocks: Tensor, tokens: int) -> Tensor:
        within = torch.arange(self.block_size, device=blocks.device)
        return (blocks.unsqueeze(1) * self.block_size + within).flatten()[:tokens]
