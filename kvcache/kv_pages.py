"""The whole KV of one document in pages, over memory and disk, with the pages that were used last decoded.

A document is written window by window while it is read, and any of its pages is brought where the model runs when
attention asks for it. Numbers pass through the codec before their first use, so a page is the same whether it was just
computed, lies in memory or comes from disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.document_summaries import DocumentSummaries
from ragkit.kvcache.encoded_windows import EncodedWindows
from ragkit.kvcache.page_cache import PageCache
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.page_grid import PageGrid
from ragkit.kvcache.page_memory import PageMemory
from ragkit.kvcache.page_records import PageRecords
from ragkit.kvcache.page_selector import PageRows, PageSelector
from ragkit.kvcache.page_summaries import PageSummaries
from ragkit.kvcache.page_window import DamagedWindowError, WindowRows
from ragkit.kvcache.resident_pages import ResidentPages
from ragkit.types import KVUse

_CHECKED_WINDOWS = 64  # that are looked at together: each look waits for the device

_log = logging.getLogger(__name__)


class KVPages:
    """One document. Passes over it take turns: whoever runs one holds `lock`.

    Args:
        codec: how pages are stored.
        refs: the windows of the document, in order; all but the last have `window_tokens` tokens.
        window_tokens: tokens of a window, a multiple of the page's.
        cache: decoded pages.
        memory: encoded pages in memory.
        records: encoded pages on disk.
        resident: room for all pages where the model runs, instead of the cache; without a disk they are only there.

    Attributes:
        grid: how the document is cut into windows and pages.
        num_windows: windows that are there; those on disk count from the start.
        repaired: windows that were damaged and computed again.
        repair: computes a window again, which is damaged: called with its number.
        lock: held by who reads the document, and for each pass of a question and its answer.
    """

    def __init__(
        self,
        codec: PageCodec,
        refs: Sequence[ChunkRef],
        window_tokens: int,
        cache: PageCache,
        memory: PageMemory,
        records: PageRecords,
        resident: ResidentPages | None = None,
    ) -> None:
        self.codec = codec
        self.refs = tuple(refs)
        self.grid = PageGrid(sum(len(ref.token_ids) for ref in self.refs), window_tokens, codec.page_size)
        self.cache = cache
        self.memory = memory
        self.records = records
        self.resident = resident
        self.repaired = 0
        self.repair: Callable[[int], None] | None = None
        self.lock = threading.RLock()
        self._windows = EncodedWindows(codec, self.refs, self.grid, memory, records)
        self._summaries = DocumentSummaries(records.tier, self.refs, self.grid, codec.layout, self.device)
        self.num_windows = self._first_unwritten = self._windows.first_gap(0)
        self._num_resident = self._num_checked = 0

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.codec.layout.num_layers

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.cache.pool.device

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.grid.page_size

    @property
    def window_tokens(self) -> int:
        """Tokens of a window."""
        return self.grid.window_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole document."""
        return self.grid.total_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the windows that are there."""
        return self.grid.tokens_of(self.num_windows)

    @property
    def num_pages(self) -> int:
        """Pages of the windows that are there; the last of a finished document may not be full."""
        return self.grid.pages_for(self.num_tokens)

    @property
    def is_complete(self) -> bool:
        """Whether every window is there."""
        return self.num_windows == len(self.refs)

    def pages_for(self, tokens: int) -> int:
        """Return how many pages `tokens` rows take."""
        return self.grid.pages_for(tokens)

    def append(self, rows: Sequence[WindowRows], recompute_ms: float = 0.0) -> None:
        """Keep the next window, the rows of each layer.

        Raises:
            KVCacheError: a number cannot be stored, or the disk could not be written.
        """
        window = self.num_windows
        pages = self.grid.pages_of(window)
        pieces: list[Tensor] = []
        for layer, one in enumerate(rows):
            if self._is_only_resident:
                assert self.resident is not None, "as asked"
                keys = self.resident.write(layer, pages, one.keys, one.values)
                self._summaries.append(layer, PageRows(keys))
                continue
            piece = self.codec.encode(layer, one.keys, one.values, one.received)
            pieces.append(piece)
            self._summaries.append(layer, PageRows(self._kept(layer, pages, piece), self._received(layer, piece)))
        self.num_windows = window + 1
        self._num_resident += self._num_resident == window
        if self._is_only_resident:
            self._check_resident(_CHECKED_WINDOWS)
            return
        with self._kept_windows():
            self._windows.settle()
        self._let_go(self._windows.add(window, pieces, recompute_ms))
        self._summaries.close_window(self.num_windows)  # last: where that cannot be stored, the window is kept

    @property
    def takes_coming(self) -> bool:
        """Whether windows can be placed that only the device has: see `append_coming`."""
        return self.resident is not None and bool(self.codec.bits) and not self.codec.with_received

    def append_coming(self, data: Tensor | None, recompute_ms: float = 0.0) -> None:
        """Count the next window as there, which was placed on the device, with its part of what selectors keep.

        Args:
            data: (bytes,) uint8, its pages in all layers behind each other; None where only the device keeps pages.
            recompute_ms: what computing it takes.

        Raises:
            KVCacheError: an earlier window cannot be stored, or the disk could not be written; the windows from there
                on are not there then.
        """
        window = self.num_windows
        self.num_windows = self._num_resident = window + 1
        if data is None:
            self._check_resident(_CHECKED_WINDOWS)
            return
        with self._kept_windows():
            self._let_go(self._windows.expect(window, data, recompute_ms))
        self._summaries.close_window(self.num_windows)

    def adopt(self) -> int:
        """Count the next windows as there that are stored behind a gap, and return how many those are.

        A window before them may have left the disk alone; read again it has the same numbers, so they still hold.
        """
        first, stop = self.num_windows, self._windows.first_gap(self.num_windows)
        while self.num_windows < stop:
            window = self.num_windows
            try:
                pieces = [self._windows.piece(layer, window) for layer in range(self.num_layers)]
            except DamagedWindowError as damage:
                _log.warning("%s: its window is computed again", damage.cause)
                self._windows.stored.discard(window)
                break
            if not self._summaries.is_empty:
                for layer, piece in enumerate(pieces):
                    self._summaries.append(layer, self._decoded_keys(layer, piece))
            self.num_windows = window + 1
            self._summaries.close_window(self.num_windows)
        return self.num_windows - first

    def replace(self, window: int, rows: Sequence[WindowRows], recompute_ms: float = 0.0) -> None:
        """Keep a window again that was damaged; in memory, where the disk does not take it.

        Raises:
            KVCacheError: a number cannot be stored, or a window that was expected before it.
        """
        with self._kept_windows():
            self._windows.settle()
        pages = self.grid.pages_of(window)
        self.cache.discard(pages)
        encoded = [self.codec.encode(layer, one.keys, one.values, one.received) for layer, one in enumerate(rows)]
        if self.resident is not None:
            for layer, piece in enumerate(encoded):
                self.resident.put(layer, pages.start, piece)
        self.repaired += 1
        try:
            self._windows.replace(window, encoded, recompute_ms)
            self.flush()
        except KVCacheError as error:  # whoever asks has an answer all the same
            _log.warning("a window that was computed again stays in memory: %s", error)
        else:
            self.memory.let_go(range(window, window + 1))

    def flush(self) -> None:
        """Write what is not written yet.

        Raises:
            KVCacheError: the disk could not be written, or what was read cannot be stored.
        """
        if self._is_only_resident:
            self._check_resident()
        try:
            with self._kept_windows():
                self._windows.settle()
        finally:
            self._windows.flush()
        self._summaries.flush()
        self._let_go(self.num_windows)

    def bring(self, layer: int, pages: Sequence[int]) -> Tensor:
        """Return (pages,) int64, the blocks of the cache's pool that hold `pages` of a layer, brought where missing.

        They hold them until other pages of the layer are asked for.

        Raises:
            KVCacheError: a page is damaged and cannot be computed again.
            CacheCapacityError: so many pages do not fit there at once.
        """
        while True:
            missing = self.cache.missing(layer, pages)
            windows = dict.fromkeys(map(self.grid.window_of, missing))
            try:
                pieces = self._windows.pieces(layer, [*windows])
            except DamagedWindowError as damage:
                self._mend(damage)
                continue
            if missing:
                encoded = torch.stack([self._row(pieces, page) for page in missing])
                decoded = self.codec.decode(layer, encoded.to(self.device, non_blocking=True))
                self.cache.put(layer, missing, decoded)
            return self.cache.blocks(layer, pages)

    def bring_windows(self, count: int) -> None:
        """Bring what `resident` does not have of the first `count` windows; nothing where there is no such place.

        Raises:
            KVCacheError: a page is damaged and cannot be computed again.
        """
        if self.resident is None:
            return
        while self._num_resident < count:
            try:
                for windows, data, extents in self._windows.whole(range(self._num_resident, count), self.device):
                    self.resident.put_windows(self.grid.first_page(windows.start), data, extents)
                    self._num_resident = windows.stop
            except DamagedWindowError as damage:
                self._mend(damage.with_traceback(None))  # it would hold the memory that windows come through

    def prefetch(self, layer: int, pages: Sequence[int]) -> Future[None] | None:
        """Start to read from disk what memory does not have of `pages`; None where that is nothing."""
        wanted = dict.fromkeys(self.grid.window_of(page) for page in pages if not self.cache.holds(layer, page))
        return self._windows.read_ahead(layer, list(wanted))

    def summaries(self, selector: PageSelector) -> PageSummaries:
        """Return what `selector` keeps of all pages that are there, made from the pages where it is new.

        Raises:
            KVCacheError: the selector needs what was not stored, or a page is damaged and cannot be computed again.
        """
        on_device = self._has_resident(self.num_windows)
        return self._summaries.of(selector, self.num_windows, self._keys_of, on_device=on_device)

    def forget_summaries(self, selector: PageSelector) -> None:
        """Let go what `selector` keeps; who asks for it again has it read or made again."""
        self._summaries.forget(selector)

    def use(self, since: KVUse | None = None) -> KVUse:
        """Return what was used so far, or since an earlier call.

        `hits` are pages that were there, decoded or not, `misses` windows that had to be computed again; bytes are
        those of pages that were not there decoded.
        """
        moved = dict(self._windows.nbytes)
        used = self.cache.hits + self.cache.misses
        if since is None:
            return KVUse(used, self.repaired, bytes_by_tier=moved)
        moved = {tier: count - since.bytes_by_tier.get(tier, 0) for tier, count in moved.items()}
        moved = {tier: count for tier, count in moved.items() if count}
        return KVUse(used - since.hits, self.repaired - since.misses, bytes_by_tier=moved)

    def close(self) -> None:
        """Write what is not written, and let everything go. Closing twice is harmless."""
        self._windows.stop()
        try:
            self.flush()
        finally:
            self.repair = None  # it refers to these pages, whose memory would wait for the garbage collector
            self._summaries.close()
            self.records.close()

    @property
    def _is_only_resident(self) -> bool:
        """Whether nobody keeps pages but the device; what rows received is not kept there."""
        return self.resident is not None and self.records.tier is None and not self.codec.with_received

    def _has_resident(self, windows: int) -> bool:
        """Whether the device holds all that was stored of the first `windows` windows."""
        return self.resident is not None and not self.codec.with_received and self._num_resident >= windows

    def _kept(self, layer: int, pages: range, piece: Tensor) -> Tensor:
        """Return the keys of fresh pages, which the device keeps from now on."""
        if self.resident is not None:
            self.resident.put(layer, pages.start, piece)
            return self.codec.decode_keys(layer, piece)
        keys, values = self.codec.decode(layer, piece)
        kept = list(pages)[-self.cache.num_pages :]
        self.cache.discard(kept)  # there already where reading was interrupted while they were added
        self.cache.put(layer, kept, (keys[-len(kept) :], values[-len(kept) :]))
        return keys

    def _check_resident(self, least: int = 1) -> None:
        """Look at the last windows if they are `least`; where one cannot be stored, let all go that nobody else has."""
        assert self.resident is not None, "asked where pages are there alone"
        if self.num_windows - self._num_checked < least:
            return
        first, stop = self.grid.first_page(self._num_checked), self.grid.first_page(self.num_windows)
        try:
            self.resident.require_finite(range(first, stop))
        except KVCacheError:
            self.num_windows = self._num_resident = self._num_checked = 0
            self._summaries.forget()
            raise
        self._num_checked = self.num_windows

    def _keys_of(self, layer: int, windows: range) -> PageRows:
        """Return the keys of windows, one alone where not all pages are on the device."""
        if self._has_resident(windows.stop):
            assert self.resident is not None, "as asked"
            pages = range(self.grid.first_page(windows.start), self.grid.first_page(windows.stop))
            return PageRows(self.resident.keys(layer, pages))
        while True:
            try:
                return self._decoded_keys(layer, self._windows.piece(layer, windows.start))
            except DamagedWindowError as damage:
                self._mend(damage)

    def _decoded_keys(self, layer: int, piece: Tensor) -> PageRows:
        return PageRows(self.codec.decode_keys(layer, piece.to(self.device)), self._received(layer, piece))

    def _received(self, layer: int, piece: Tensor) -> Tensor | None:
        received = self.codec.received(layer, piece)
        return None if received is None else received.to(self.device)

    def _row(self, pieces: dict[int, Tensor], page: int) -> Tensor:
        window = self.grid.window_of(page)
        return pieces[window][page - self.grid.first_page(window)]

    def _mend(self, damage: DamagedWindowError) -> None:
        if self.repair is None:
            raise KVCacheError(f"{damage.cause}: the document has to be read again") from damage
        _log.warning("%s: its window is computed again", damage.cause)
        self.repair(damage.window)

    @contextmanager
    def _kept_windows(self) -> Iterator[None]:
        """Forget the windows behind the last one that is kept where what comes from the device cannot be."""
        try:
            yield
        except BaseException:  # an interrupt as well
            self.num_windows = min(self.num_windows, self._windows.next_window)
            self._num_resident = min(self._num_resident, self.num_windows)
            self._summaries.forget()
            raise

    def _let_go(self, stop: int) -> None:
        """Let memory forget the windows before `stop`, which are on disk."""
        if self.records.tier is not None and stop > self._first_unwritten:
            self.memory.let_go(range(self._first_unwritten, stop))
            self._first_unwritten = stop
