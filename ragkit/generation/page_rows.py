"""Where a pass finds the rows of a document's pages: a cache of decoded ones, or a GPU that holds all encoded."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ragkit.config import PagePositions
from ragkit.generation.page_lists import PageLayout
from ragkit.generation.page_options import PageOptions
from ragkit.kernels.gather_pages import PageLists, gather_pages
from ragkit.kernels.page_log_sums import page_log_sums
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_scoring import head_products
from ragkit.kvcache.resident_pages import ResidentPages
from ragkit.kvcache.rope import RotaryTable


class PageSource(Protocol):
    """Gives what a layer needs of the pages that are listed, (groups, pages) int32 on the device."""

    def log_sums(self, layer: int, queries: Tensor, listed: Tensor, scale: float) -> Tensor:
        """Return (queries, q_heads, pages) fp32, the logits of pages by all their keys, which stand at position 0."""
        ...

    def load(self, layer: int, listed: Tensor, keys: Tensor, values: Tensor, before: Tensor | None = None) -> None:
        """Write the rows of pages into `keys`, turned to where they stand, and `values`, as far as these have room.

        `before` is the list whose rows are there already, of the same layer.
        """
        ...


def page_source(pages: KVPages, layout: PageLayout, options: PageOptions, rotary: RotaryTable) -> PageSource:
    """Return where the rows of `pages` are found."""
    if pages.resident is not None:
        return ResidentRows(pages.resident, layout, options, rotary)
    return CachedRows(pages, layout, options, rotary)


class ResidentRows:
    """Rows of pages that all lie on the device: it is told nothing but to launch, and the host waits for nothing.

    Args:
        resident: the pages.
        layout: which can be chosen.
        options: where they stand.
        rotary: the rotary table.
    """

    def __init__(self, resident: ResidentPages, layout: PageLayout, options: PageOptions, rotary: RotaryTable) -> None:
        self._resident = resident
        self._layout = layout
        self._options = options
        self._rotary = rotary
        # Where pages stand depends on which they are for true positions alone.
        self._positions: Tensor | None = None
        if options.positions is not PagePositions.TRUE:
            any_pages = torch.zeros((1, layout.num_listed), dtype=torch.int64, device=rotary.cos.device)
            self._positions = layout.page_positions(any_pages, options).int()

    def log_sums(self, layer: int, queries: Tensor, listed: Tensor, scale: float) -> Tensor:
        """Return the logits of the listed pages, from their codes."""
        return page_log_sums(queries, self._resident.blocks(layer)[0], scale=scale, listed=listed)

    def load(self, layer: int, listed: Tensor, keys: Tensor, values: Tensor, before: Tensor | None = None) -> None:
        """Write the rows of the listed pages: of all, for which of them are others only the device knows."""
        positions = self._positions
        if positions is None:
            positions = self._layout.page_positions(listed.long(), self._options).int()
        key_blocks, value_blocks = self._resident.blocks(layer)
        gather_pages(
            key_blocks, value_blocks, PageLists(listed, positions), self._rotary.cos, self._rotary.sin,
            dtype=keys.dtype, out=(keys, values),
        )  # fmt: skip


class CachedRows:
    """Rows of pages that are brought into the cache of decoded ones when they are asked for.

    Args:
        pages: the document.
        layout: which can be chosen.
        options: where they stand.
        rotary: the rotary table.
    """

    def __init__(self, pages: KVPages, layout: PageLayout, options: PageOptions, rotary: RotaryTable) -> None:
        self._pages = pages
        self._layout = layout
        self._options = options
        self._rotary = rotary

    def log_sums(self, layer: int, queries: Tensor, listed: Tensor, scale: float) -> Tensor:
        """Return the logits of the listed pages, from their decoded keys."""
        keys = _rows_of(self._pages.cache.pool.keys[layer], self._blocks(layer, listed))
        products = head_products(queries, keys) * scale
        return _log_sums(products.unflatten(2, (-1, self._layout.page_size)))

    def load(self, layer: int, listed: Tensor, keys: Tensor, values: Tensor, before: Tensor | None = None) -> None:
        """Write the rows of the listed pages that stand where others stood, which follows from their places."""
        at, pool = self._blocks(layer, listed), self._pages.cache.pool
        positions = self._layout.row_positions(listed.long(), self._options)
        if before is None:
            places = torch.arange(listed.shape[1], device=listed.device)
        else:
            places = (listed != before).any(dim=0).nonzero().flatten()
            at = at[:, places]
        size = self._layout.page_size
        rows = (places.unsqueeze(1) * size + torch.arange(size, device=listed.device)).flatten()
        rows = rows[rows < len(keys)]  # of the last page, which may not be full
        found, values_found = (_rows_of(part[layer], at)[: len(rows)] for part in (pool.keys, pool.values))
        values.index_copy_(0, rows, values_found)
        for head, own in enumerate(positions[:, rows]):
            heads = slice(None) if len(positions) == 1 else slice(head, head + 1)
            keys[:, heads].index_copy_(0, rows, self._rotary.rotate(found[:, heads], own))

    def _blocks(self, layer: int, listed: Tensor) -> Tensor:
        """Return (groups, listed) int64, the cache's blocks of pages, brought where they are missing."""
        wanted = listed.unique().tolist()
        block_of = torch.zeros(max(1, self._layout.end), dtype=torch.int64)
        block_of[wanted] = self._pages.bring(layer, wanted)
        self._pages.prefetch((layer + 1) % self._pages.num_layers, wanted)
        return block_of[listed.cpu().long()].to(self._pages.device)


def _log_sums(logits: Tensor) -> Tensor:
    """Return the logarithms of the sums of exponentials over the last dimension, in fp32.

    A softmax reads each row once, where maximum, exponentials and sum would take five passes.
    """
    wide = logits.float()
    return wide[..., 0] - wide.log_softmax(dim=-1)[..., 0]


def _rows_of(blocks: Tensor, at: Tensor) -> Tensor:
    """Return (rows, kv_heads, head_dim): the rows of the blocks `at` (groups, listed), each group of heads its own."""
    if len(at) == 1:
        return blocks[at[0]].flatten(0, 1)
    heads = torch.arange(len(at), device=at.device)
    return blocks.permute(2, 0, 1, 3)[heads.unsqueeze(1), at].flatten(1, 2).transpose(0, 1)
