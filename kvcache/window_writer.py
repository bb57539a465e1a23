"""Puts windows of a document where they belong while only the device knows which ones they are.

A CUDA graph that reads a window is replayed for all the others, so every place in it follows from one number on the
device: the window's first page. Rows are encoded once; the codes go into the resident pages, what the selector keeps
into its summaries, and all of it as bytes into one tensor, which the host stores while the next window is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_selector import PageRows
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
        self._at = self._within
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
        self._at = self._within + self.end

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the rows (tokens, kv_heads, head_dim) of a layer, keys before RoPE."""
        parts = self._pages.codec.quantized(keys, values)
        placed = self._resident.place(layer, self._at, parts)
        self._summaries.put(layer, PageRows(placed), self._at)
        if self._data is not None:
            self._pages.codec.join(parts, self._pieces[layer])

    def finish(self, recompute_ms: float) -> None:
        """Tell the document that the window is there.

        Raises:
            KVCacheError: an earlier window cannot be stored.
        """
        self._summaries.count(self._count)
        self._pages.append_coming(self._data, recompute_ms)
