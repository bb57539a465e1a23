"""Puts windows of a document where they belong while only the device knows which ones they are.

A CUDA graph that reads a window is replayed for all the others, so every place in it follows from one number on the
device: the window's first page. Rows are encoded once, straight into the resident pages, and what the selector keeps is
made from their codes. Where pages are stored, their bytes are gathered from there into one tensor, which the host
stores while the next window is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_summaries import PageSummaries


class WindowWriter:
    """Writes whole windows of one document whose pages all lie on the device.

    Args:
        pages: the document.
        summaries: what the selector keeps that windows find pages by; it has room for all.

    Attributes:
        end: (1,) int64 on the device, the pages before the window that is written.
    """

    def __init__(self, pages: KVPages, summaries: PageSummaries) -> None:
        assert pages.resident is not None, "windows are written on the device"
        self._pages = pages
        self._resident = pages.resident
        self._summaries = summaries
        self._count = pages.window_tokens // pages.page_size
        self.end = torch.zeros(1, dtype=torch.int64, device=pages.device)
        self._within = torch.arange(self._count, device=pages.device)
        self._coming = self._resident.coming(self._within)
        sizes = [pages.codec.page_bytes(layer) for layer in range(pages.num_layers)]
        self._data: Tensor | None = None
        if pages.records.tier is not None:
            self._data = torch.empty(self._count * sum(sizes), dtype=torch.uint8, device=pages.device)
            parts = self._data.split([self._count * size for size in sizes])
            self._pieces = [part.view(self._count, -1) for part in parts]

    def start(self) -> None:
        """Say on the device which window comes next."""
        self.end.fill_(self._pages.num_windows * self._count)

    def begin(self) -> None:
        """Begin the window: what follows is the same for every one."""
        self._coming = self._resident.coming(self._within + self.end)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the rows (tokens, kv_heads, head_dim) of a layer, keys before RoPE."""
        codec, pages = self._pages.codec, self._coming.pages
        self._resident.place(layer, self._coming, keys, values)
        blocks, _ = self._resident.blocks(layer)
        assert isinstance(blocks, QuantizedBlocks), "as `takes_coming` says"
        self._summaries.put(layer, blocks, pages, codec.layout.dtype)
        if self._data is not None:
            codec.join(self._resident.parts(layer, pages), self._pieces[layer])

    def finish(self, recompute_ms: float) -> None:
        """Tell the document that the window is there.

        Raises:
            KVCacheError: an earlier window cannot be stored.
        """
        self._summaries.count(self._count)
        self._pages.append_coming(self._data, recompute_ms)
