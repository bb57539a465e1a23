"""A whole document's pages on a GPU, encoded as they are stored: attention finds them without asking the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.kernels.paged_rows import Blocks
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.quantized_pool import QuantizedPool


class ResidentPages:
    """Pools in which block i is page i of the document, in every layer.

    Args:
        codec: how pages are encoded.
        num_pages: pages of the document.
        device: where the model runs.

    Attributes:
        nbytes: what the pools take.
    """

    def __init__(self, codec: PageCodec, num_pages: int, device: torch.device) -> None:
        self._codec = codec
        self._pool: KVPool | QuantizedPool
        if codec.bits:
            self._pool = QuantizedPool(
                codec.layout, num_pages, device, bits=codec.bits, group=codec.group, block_size=codec.page_size
            )
        else:
            self._pool = KVPool(codec.layout, num_pages, device, codec.page_size)
        self.nbytes = sum(part.nbytes for part in (*self._pool.keys, *self._pool.values))

    def put(self, layer: int, first: int, data: Tensor) -> None:
        """Place encoded pages (pages, page_bytes) uint8 of a layer from page `first` on."""
        data = data.to(self._pool.device, non_blocking=True)
        blocks = torch.arange(first, first + len(data), device=self._pool.device)
        if isinstance(self._pool, QuantizedPool):
            self._pool.place(layer, blocks, *self._codec.codes(layer, data))
        else:
            self._pool.keys[layer][blocks], self._pool.values[layer][blocks] = self._codec.decode(layer, data)

    def keys(self, layer: int, first: int, stop: int) -> Tensor:
        """Return the keys (pages, page_size, kv_heads, head_dim) of the pages from `first` up to `stop`."""
        if isinstance(self._pool, KVPool):
            return self._pool.keys[layer][first:stop]
        slots = torch.arange(first * self._codec.page_size, stop * self._codec.page_size, device=self._pool.device)
        rows = self._pool.keys[layer].rows(slots).to(self._codec.layout.dtype)
        return rows.view(stop - first, self._codec.page_size, *rows.shape[1:])

    def blocks(self, layer: int) -> tuple[Blocks, Blocks]:
        """Return the keys' and the values' blocks of a layer."""
        return self._pool.keys[layer], self._pool.values[layer]
