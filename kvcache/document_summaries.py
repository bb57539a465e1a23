"""What each selector keeps of one document's pages: kept up while it is read, and stored beside the pages."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.backing_tier import BackingTier
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.layout import KVLayout
from ragkit.kvcache.page_grid import PageGrid
from ragkit.kvcache.page_selector import PageRows, PageSelector
from ragkit.kvcache.page_summaries import PageSummaries
from ragkit.kvcache.page_summary_records import PageSummaryRecords, StoredSummary
from ragkit.kvcache.page_summary_shapes import PageSummaryShapes

_READERS = 4  # threads that read sections: checking what was read takes longer than reading it

_log = logging.getLogger(__name__)

ReadRows: TypeAlias = Callable[[int, range], PageRows]


class DocumentSummaries:
    """The summaries of one document, of every selector that was asked for.

    Args:
        tier: where they are stored; None stores nothing.
        refs: the document's windows.
        grid: how they are cut into pages.
        layout: of the model's keys.
        device: where they are kept.
    """

    def __init__(
        self, tier: BackingTier | None, refs: Sequence[ChunkRef], grid: PageGrid, layout: KVLayout, device: torch.device
    ) -> None:
        self._records = PageSummaryRecords(tier, refs, layout.num_layers)
        self._grid = grid
        self._layout = layout
        self._num_layers = layout.num_layers
        self._device = device
        self._of: dict[str, PageSummaries] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no selector was asked for."""
        return not self._of

    def append(self, layer: int, rows: PageRows) -> None:
        """Add the next pages of a layer."""
        for summaries in self._of.values():
            summaries.append(layer, rows)

    def close_window(self, windows: int) -> None:
        """Store the section that ends with `windows` windows, where one does."""
        for section in self._records.sections():
            if section.stop == windows:
                for summaries in self._of.values():
                    self._write(summaries, section)

    def of(self, selector: PageSelector, windows: int, read: ReadRows, *, on_device: bool) -> PageSummaries:
        """Return what `selector` keeps of the first `windows` windows, made from the pages where it is new.

        It is made from pages that the device holds even where it is stored, unless the selector says that it loads
        sooner: an H100 makes 4.8 GB of it in a second, and few disks give as much.

        While it is made, `read` may ask for it again, to compute a window that is damaged: then it holds all layers of
        the windows before that one, so all layers are made of some windows before the next ones are read.

        Args:
            selector: what summarises.
            windows: those that are there.
            read: gives the rows of a layer and some neighbouring windows; of one where the device does not hold them.
            on_device: whether it holds all of their pages.
        """
        found = self._of.get(selector.selector_id)
        # More pages than there are: reading was interrupted while a window was added.
        if found is not None and max(found.num_pages) <= self._grid.first_page(windows):
            return found
        made = PageSummaries(selector, self._num_layers, self._grid.num_pages)
        self._of[selector.selector_id] = made
        shapes = PageSummaryShapes(selector, self._layout, self._grid.page_size)
        first: list[StoredSummary] | None = None
        at_once = self._grid.num_windows if on_device else 1
        try:
            known = self._records.known(selector) if on_device and not selector.loads_sooner else set()
            for section, stored in self._stored(selector, windows, known):
                if stored is not None and self._fits(made, shapes, section, stored, first):
                    first = first or stored
                    self._extend(made, section, stored)
                    continue
                stop = min(section.stop, windows)
                for start in range(section.start, stop, at_once):
                    self._add(made, range(start, min(start + at_once, stop)), read)
                if section.stop <= windows and section not in known:
                    self._store(partial(self._write, made, section))
            self._store(self._records.flush)
        except BaseException:
            self.forget(selector)
            raise
        return made

    def _store(self, write: Callable[[], None]) -> None:
        """Write what was made for somebody who asks and has it either way."""
        try:
            write()
        except KVCacheError as error:
            _log.warning("what a selector keeps of a document was not stored, and will be made again: %s", error)

    def forget(self, selector: PageSelector | None = None) -> None:
        """Let go what a selector keeps, or everything."""
        if selector is None:
            self._of.clear()
        else:
            self._of.pop(selector.selector_id, None)

    def flush(self) -> None:
        """Write what waits.

        Raises:
            KVCacheError: the disk could not be written.
        """
        self._records.flush()

    def close(self) -> None:
        """End writing; what waits is lost."""
        self._records.close()

    def _stored(
        self, selector: PageSelector, windows: int, known: Set[range]
    ) -> Iterator[tuple[range, list[StoredSummary] | None]]:
        """Yield the sections that begin below `windows`, and what is stored of those that end there, but of `known`."""
        sections = [section for section in self._records.sections() if section.start < windows]
        whole = deque(section for section in sections if section.stop <= windows and section not in known)
        loading: dict[range, Future[EncodedKV | None]] = {}
        with ThreadPoolExecutor(_READERS, thread_name_prefix="ragkit-summary-read") as readers:
            load = partial(self._records.load, selector, page_locked=self._device.type == "cuda")
            for section in sections:
                while whole and len(loading) < _READERS:  # page-locked memory is dear, and free again when copied
                    following = whole.popleft()
                    loading[following] = readers.submit(load, following)
                loaded = loading.pop(section).result() if section in loading else None
                yield section, None if loaded is None else self._records.parsed(loaded)

    def _extend(self, made: PageSummaries, section: range, stored: list[StoredSummary]) -> None:
        """Add what is stored of a section."""
        pages = self._pages_of(section)
        for layer, one in enumerate(stored):
            # Parts are copied to where the document's lie; what is fitted is kept, and would keep the whole section.
            fitted = [part.to(self._device, non_blocking=True, copy=True) for part in one.fitted]
            made.extend(layer, pages, [part.to(self._device, non_blocking=True) for part in one.parts], fitted)

    def _pages_of(self, section: range) -> int:
        return self._grid.first_page(section.stop) - self._grid.first_page(section.start)

    def _cuts_a_group(self, selector: PageSelector, section: range) -> bool:
        """Return whether pages that are summarised together stand on both sides of a section's end."""
        return bool(self._pages_of(section) % selector.group_pages) and section.stop < self._grid.num_windows

    def _fits(
        self,
        made: PageSummaries,
        shapes: PageSummaryShapes,
        section: range,
        stored: list[StoredSummary],
        first: list[StoredSummary] | None,
    ) -> bool:
        """Return whether a section follows what is there, shaped as the selector makes it, for the same document.

        Of the same document are sections whose bases are those of the ones before. They are compared in memory with
        those of the `first` section that was stored and taken, if there is one: to compare them on the device waits
        for it, once a layer and section.
        """
        pages = self._pages_of(section)
        if not made.is_closed or self._cuts_a_group(made.selector, section):
            return False
        if not all(shapes.are_of(layer, pages, one.fitted, one.parts) for layer, one in enumerate(stored)):
            return False
        if first is None:
            return all(
                made.fits(layer, [part.to(self._device) for part in one.fitted]) for layer, one in enumerate(stored)
            )  # fmt: skip
        return all(
            len(one.fitted) == len(other.fitted) and all(map(_are_equal, one.fitted, other.fitted))
            for one, other in zip(stored, first, strict=True)
        )

    def _add(self, made: PageSummaries, windows: range, read: ReadRows) -> None:
        """Add the pages of some windows, in all layers."""
        for layer in range(self._num_layers):
            made.append(layer, read(layer, windows))

    def _write(self, made: PageSummaries, section: range) -> None:
        """Store a section, unless its last group of pages goes on behind it."""
        if self._cuts_a_group(made.selector, section):
            return
        first, stop = self._grid.first_page(section.start), self._grid.first_page(section.stop)
        self._records.write(made, section, first, stop)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether tensors in host memory have the same bytes; torch would wake all of its threads for each."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    mine, others = (part.flatten().view(torch.uint8).numpy() for part in (one, other))
    return np.array_equal(mine, others)
