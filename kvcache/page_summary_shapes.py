"""What a selector's summaries are like before there are any: their shapes, types and bytes.

A selector says them by example: it summarises pages of zeros. Of more pages a summary has as many more rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ragkit.kernels.backend import ceil_div
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.page_selector import PageRows, PageSelector, Takes

_Heads: TypeAlias = tuple[int, int]  # of a layer: num_kv_heads and head_dim
_Example: TypeAlias = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # of the document as a whole, and of some pages


class PageSummaryShapes:
    """The shapes of what one selector keeps of a model's pages.

    Args:
        selector: what summarises.
        layout: of the model's keys.
        page_size: tokens of a page.
    """

    def __init__(self, selector: PageSelector, layout: KVLayout, page_size: int) -> None:
        self._selector = selector
        self._layout = layout
        self._page_size = page_size
        self._examples: dict[tuple[_Heads, int], _Example] = {}

    def are_of(self, layer: int, pages: int, fitted: Sequence[Tensor], parts: Sequence[Tensor]) -> bool:
        """Return whether tensors are shaped and typed as what is kept of a layer, and of `pages` of its pages.

        Args:
            layer: index of the layer.
            pages: whole groups, or all up to the end of the document.
            fitted: what is kept of the document as a whole.
            parts: what is kept of the pages.
        """
        whole, rest = divmod(pages, self._selector.group_pages)
        heads = _heads(self._layout.layers[layer])
        own, group = self._example(heads, self._selector.group_pages)
        rows = [whole * len(part) for part in group]
        if rest:
            rows = [more + len(part) for more, part in zip(rows, self._example(heads, rest)[1], strict=True)]
        kept = [((count, *part.shape[1:]), part.dtype) for part, count in zip(group, rows, strict=True)]
        return _shapes(fitted) == _shapes(own) and _shapes(parts) == kept

    def nbytes(self, num_pages: int) -> int:
        """Return the bytes that the summaries of `num_pages` pages of all layers take; without what is fitted."""
        if self._selector.takes is not Takes.BEST:
            return 0
        group = self._selector.group_pages
        parts = (part for layer in self._layout.layers for part in self._example(_heads(layer), group)[1])
        return sum(part.nbytes for part in parts) * ceil_div(num_pages, group)

    def _example(self, heads: _Heads, pages: int) -> _Example:
        """Return what is kept of that many pages, at most a group of them."""
        if (heads, pages) not in self._examples:
            shape = (pages, self._page_size, heads[0])
            rows = PageRows(torch.zeros((*shape, heads[1]), dtype=self._layout.dtype), torch.zeros(shape))
            fitted = self._selector.fit(rows)
            self._examples[heads, pages] = fitted, self._selector.summarise(rows, fitted)
        return self._examples[heads, pages]


def _heads(layer: LayerSpec) -> _Heads:
    return layer.num_kv_heads, layer.head_dim


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(one.shape), one.dtype) for one in tensors]
