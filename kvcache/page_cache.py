"""Decoded pages where the model runs: layer by layer the pages that were used last, in blocks of a pool."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.errors import CacheCapacityError
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.layout import KVLayout
from ragkit.kvcache.pool import KVPool


class PageCache:
    """Blocks of a pool that hold pages of one document, for each layer its own; the page used longest ago leaves.

    The other blocks of the pool are free for the rows of requests, so that attention reads both from one pool.

    Args:
        layout: the model's layers.
        page_size: tokens of a page, which is a block of the pool.
        num_pages: pages of each layer that are kept.
        own_pages: blocks beside them that requests can have.
        device: where the model runs.

    Attributes:
        pool: its blocks.
        hits, misses: pages that were asked for and were here, and that had to be brought.
    """

    def __init__(self, layout: KVLayout, page_size: int, num_pages: int, own_pages: int, device: torch.device) -> None:
        self.pool = KVPool(layout, num_pages + own_pages, device, page_size)
        self.num_pages = num_pages
        self.hits = self.misses = 0
        blocks = self.pool.allocate(num_pages)
        self._free = [list(blocks) for _ in range(layout.num_layers)]
        self._block_of: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(layout.num_layers)]

    def missing(self, layer: int, pages: Sequence[int]) -> list[int]:
        """Return those of `pages` that are not here; the others count as used now.

        Raises:
            CacheCapacityError: so many pages are never here at once.
        """
        if len(pages) > self.num_pages:
            raise CacheCapacityError(
                f"{len(pages)} pages are attended to at once, and each layer keeps {self.num_pages} decoded ones: "
                "raise pages.cache_mb, or lower pages.budget_tokens"
            )
        here = self._block_of[layer]
        absent = []
        for page in pages:
            if page in here:
                here.move_to_end(page)
            else:
                absent.append(page)
        self.hits += len(pages) - len(absent)
        self.misses += len(absent)
        return absent

    def put(self, layer: int, pages: Sequence[int], rows: LayerKV) -> None:
        """Keep distinct pages that are not here, the rows (pages, page_size, kv_heads, head_dim) of both."""
        if not pages:
            return
        here, free = self._block_of[layer], self._free[layer]
        while len(free) < len(pages):
            free.append(here.popitem(last=False)[1])
        blocks = [free.pop() for _ in pages]
        at = torch.tensor(blocks, device=self.pool.device)
        self.pool.keys[layer][at], self.pool.values[layer][at] = rows
        here.update(zip(pages, blocks, strict=True))

    def blocks(self, layer: int, pages: Sequence[int]) -> Tensor:
        """Return (pages,) int64 on the host, the blocks of pages that are here."""
        here = self._block_of[layer]
        return torch.tensor([here[page] for page in pages], dtype=torch.int64)

    def holds(self, layer: int, page: int) -> bool:
        """Return whether a page is here, without counting a use."""
        return page in self._block_of[layer]

    def discard(self, pages: Sequence[int]) -> None:
        """Forget pages in all layers."""
        for here, free in zip(self._block_of, self._free, strict=True):
            free += [here.pop(page) for page in pages if page in here]
