"""What a selector keeps of a growing document's pages, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kernels.backend import ceil_div
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kvcache.page_selector import PageRows, PageSelector, ScoresWithin


class PageSummaries:
    """The summaries of all layers of one document by one selector. Memory grows by doubling.

    Pages are added in order. A group that is not full yet is summarised with what there is of it, and again when more
    of its pages come; until then its keys are kept.

    Args:
        selector: what summarises.
        num_layers: layers of the model.
        all_pages: pages that there will be, where that is known: memory for them is taken at once, and none is copied
            while it grows.

    Attributes:
        num_pages: pages of each layer so far.
    """

    def __init__(self, selector: PageSelector, num_layers: int, all_pages: int = 0) -> None:
        self.selector = selector
        self._all_pages = all_pages
        self.num_pages = [0] * num_layers
        self._fitted: list[tuple[Tensor, ...]] = [()] * num_layers
        self._parts: list[tuple[_Growing, ...]] = [()] * num_layers
        self._closed: list[tuple[int, ...]] = [()] * num_layers  # lengths of the parts without the open group
        self._open: list[PageRows | None] = [None] * num_layers
        # Lengths of the parts by the number of pages that they were of, where no group was open.
        self._marks: list[dict[int, tuple[int, ...]]] = [{0: ()} for _ in range(num_layers)]

    @property
    def is_closed(self) -> bool:
        """Whether no group of any layer waits for more pages."""
        return all(rows is None for rows in self._open)

    @property
    def nbytes(self) -> int:
        """Bytes that the summaries take, without room to grow."""
        fitted = sum(part.nbytes for parts in self._fitted for part in parts)
        return fitted + sum(part.view().nbytes for parts in self._parts for part in parts)

    def append(self, layer: int, rows: PageRows) -> None:
        """Add the next pages of a layer."""
        pages = len(rows.keys)
        if pages == 0:
            return
        if self.selector.needs_received and rows.received is None:
            raise KVCacheError(
                f"the selector {self.selector.selector_id} needs the attention that rows received while the document "
                "was read, and it was not kept: ingest the document with this selector"
            )
        waiting = self._open[layer]
        if waiting is not None:
            self._marks[layer].pop(self.num_pages[layer], None)
            for part, length in zip(self._parts[layer], self._closed[layer], strict=True):
                part.cut(length)
            rows = _joined(waiting, rows)
        self.num_pages[layer] += pages
        if len(rows.keys) == self.num_pages[layer]:  # the first group is among them, or still open
            self._fitted[layer] = self.selector.fit(_some(rows, 0, self.selector.group_pages))
        whole = len(rows.keys) // self.selector.group_pages * self.selector.group_pages
        if whole:
            self._add(layer, whole, self._summarised(layer, _some(rows, 0, whole)))
        self._closed[layer] = tuple(part.length for part in self._parts[layer])
        self._open[layer] = None
        closed_pages = self.num_pages[layer] - (len(rows.keys) - whole)
        self._marks[layer][closed_pages] = self._closed[layer]
        if whole < len(rows.keys):
            rest = _some(rows, whole, len(rows.keys))
            self._add(layer, len(rest.keys), self._summarised(layer, rest))
            self._closed[layer] = self._closed[layer] or (0,) * len(self._parts[layer])
            self._open[layer] = PageRows(rest.keys.clone(), None if rest.received is None else rest.received.clone())
            self._marks[layer][self.num_pages[layer]] = tuple(part.length for part in self._parts[layer])

    def of(self, layer: int) -> tuple[Tensor, ...]:
        """Return what was kept of a layer, of the document and of its pages; views that hold until pages are added."""
        return (*self._fitted[layer], *(part.view() for part in self._parts[layer]))

    def has_room(self, pages: int) -> bool:
        """Return whether the first `pages` pages have their places, so that `put` can take those that are missing."""
        is_apart = self.selector.group_pages == 1 and self.is_closed
        return is_apart and all(parts and min(part.room for part in parts) >= pages for parts in self._parts)

    def with_room(self, layer: int, pages: int) -> tuple[Tensor, ...]:
        """Return what `of` does with the room behind it, `pages` pages together."""
        return (*self._fitted[layer], *(part.all(pages) for part in self._parts[layer]))

    def put(self, layer: int, keys: QuantizedBlocks, pages: Tensor, dtype: torch.dtype) -> None:
        """Write what is kept of pages where they belong, which only the device knows; `count` tells the host.

        Args:
            layer: index of the layer.
            keys: of all pages of the layer, page i in block i.
            pages: (pages,) int64 on the device, the pages that are there now.
            dtype: the type that keys are decoded to.
        """
        assert isinstance(self.selector, ScoresWithin), "asked before windows are recorded"
        self.selector.keep(keys, pages, tuple(part.all(part.room) for part in self._parts[layer]), dtype)

    def count(self, pages: int) -> None:
        """Count `pages` more pages of every layer as there, which `put` has written."""
        for layer, parts in enumerate(self._parts):
            self.num_pages[layer] += pages
            for part in parts:
                part.length += pages
            self._closed[layer] = tuple(part.length for part in parts)
            self._marks[layer][self.num_pages[layer]] = self._closed[layer]

    def fitted(self, layer: int) -> tuple[Tensor, ...]:
        """Return what was kept of a layer of the document as a whole."""
        return self._fitted[layer]

    def between(self, layer: int, first: int, stop: int) -> tuple[Tensor, ...]:
        """Return what was kept of the pages from `first` up to `stop`; nothing where a group reaches beyond them."""
        marks = self._marks[layer]
        if first not in marks or stop not in marks:
            return ()
        starts = marks[first] or (0,) * len(marks[stop])
        return tuple(
            part.view()[start:end] for part, start, end in zip(self._parts[layer], starts, marks[stop], strict=True)
        )

    def fits(self, layer: int, fitted: Sequence[Tensor]) -> bool:
        """Return whether what `fitted` gave of a layer is that of these summaries, or they have no pages yet."""
        own = self._fitted[layer]
        alike = len(own) == len(fitted) and all(torch.equal(*pair) for pair in zip(own, fitted, strict=True))
        return self.num_pages[layer] == 0 or alike

    def extend(self, layer: int, pages: int, parts: Sequence[Tensor], fitted: Sequence[Tensor] = ()) -> None:
        """Add the next `pages` pages by what `between` and `fitted` gave of them; no group may be open before."""
        assert self._open[layer] is None, "a group that is open would be cut in two"
        self._fitted[layer] = self._fitted[layer] or tuple(fitted)
        self._add(layer, pages, tuple(parts))
        self._closed[layer] = tuple(part.length for part in self._parts[layer])
        self.num_pages[layer] += pages
        self._marks[layer][self.num_pages[layer]] = self._closed[layer]

    def _summarised(self, layer: int, rows: PageRows) -> tuple[Tensor, ...]:
        return self.selector.summarise(rows, self._fitted[layer])

    def _add(self, layer: int, pages: int, parts: tuple[Tensor, ...]) -> None:
        if not self._parts[layer]:
            # What is kept of a group of pages takes the same rows for every group.
            group = self.selector.group_pages
            share = ceil_div(self._all_pages, group) / ceil_div(pages, group)
            self._parts[layer] = tuple(_Growing(part, math.ceil(len(part) * share)) for part in parts)
        else:
            for part, more in zip(self._parts[layer], parts, strict=True):
                part.append(more)


class _Growing:
    """Rows with room for more."""

    def __init__(self, rows: Tensor, capacity: int) -> None:
        self.length = len(rows)
        self._buffer = rows
        if capacity > len(rows):
            self._buffer = rows.new_empty((capacity, *rows.shape[1:]))
            self._buffer[: len(rows)] = rows

    def append(self, rows: Tensor) -> None:
        wanted = self.length + len(rows)
        if wanted > len(self._buffer):
            grown = self._buffer.new_empty((max(wanted, 2 * len(self._buffer)), *self._buffer.shape[1:]))
            grown[: self.length] = self._buffer[: self.length]
            self._buffer = grown
        self._buffer[self.length : wanted] = rows
        self.length = wanted

    @property
    def room(self) -> int:
        return len(self._buffer)

    def all(self, rows: int) -> Tensor:
        return self._buffer[:rows]

    def cut(self, length: int) -> None:
        self.length = length

    def view(self) -> Tensor:
        return self._buffer[: self.length]


def _some(rows: PageRows, start: int, stop: int) -> PageRows:
    return PageRows(rows.keys[start:stop], None if rows.received is None else rows.received[start:stop])


def _joined(first: PageRows, second: PageRows) -> PageRows:
    received = None
    if first.received is not None and second.received is not None:
        received = torch.cat((first.received, second.received))
    return PageRows(torch.cat((first.keys, second.keys)), received)
