"""The whole KV of one document in pages, over memory and disk, with the pages that were used last decoded.

A document is written window by window while it is read, and any of its pages is brought where the model runs when
attention asks for it. Numbers pass through the codec before their first use, so a page is the same whether it was just
computed, lies in memory or comes from disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.kv_segment import KVMissError, MissReason
from ragkit.kvcache.page_cache import PageCache
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.page_memory import PageMemory
from ragkit.kvcache.page_records import PageRecords
from ragkit.kvcache.page_selector import PageRows, PageSelector
from ragkit.kvcache.page_summaries import PageSummaries
from ragkit.kvcache.page_summary_records import PageSummaryRecords
from ragkit.kvcache.page_window import DamagedWindowError, WindowRows
from ragkit.kvcache.resident_pages import ResidentPages
from ragkit.types import KVUse

MEMORY, DISK = "ram", "disk"  # how the places of encoded pages are called in reports

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
        total_tokens: tokens of the whole document.
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
        self.window_tokens = window_tokens
        self.total_tokens = sum(len(ref.token_ids) for ref in self.refs)
        self.page_size = codec.page_size
        self.cache = cache
        self.memory = memory
        self.records = records
        self.resident = resident
        self._stored = records.present(self.refs)
        self.num_windows = self._first_gap(0)
        self.repaired = 0
        self.repair: Callable[[int], None] | None = None
        self.lock = threading.RLock()
        self._first_unwritten = self.num_windows
        self._num_resident = 0
        self._summaries: dict[str, PageSummaries] = {}
        self._summary_records = PageSummaryRecords(records.tier, self.refs, codec.layout.num_layers)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="ragkit-page-load")
        self._loading: set[tuple[int, int]] = set()
        self._bytes = {MEMORY: 0, DISK: 0}

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.codec.layout.num_layers

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.cache.pool.device

    @property
    def num_tokens(self) -> int:
        """Tokens of the windows that are there."""
        return min(self.num_windows * self.window_tokens, self.total_tokens)

    @property
    def num_pages(self) -> int:
        """Pages of the windows that are there; the last of a finished document may not be full."""
        return self.pages_for(self.num_tokens)

    @property
    def is_complete(self) -> bool:
        """Whether every window is there."""
        return self.num_windows == len(self.refs)

    def pages_for(self, tokens: int) -> int:
        """Return how many pages `tokens` rows take."""
        return -(-tokens // self.page_size)

    def append(self, rows: Sequence[WindowRows], recompute_ms: float = 0.0) -> None:
        """Keep the next window, the rows of each layer.

        Raises:
            KVCacheError: a number cannot be stored, or the disk could not be written.
        """
        window = self.num_windows
        self.memory.hold(window)
        fresh = self._encode(rows)
        pages = range(self._first_page(window), self._first_page(window + 1))
        for layer, piece in enumerate(fresh):
            if self.resident is not None:
                self.resident.put(layer, pages.start, piece)
                keys = self.codec.decode_keys(layer, piece)
            else:
                keys, values = self.codec.decode(layer, piece)
                kept = list(pages)[-self.cache.num_pages :]
                self.cache.put(layer, kept, (keys[-len(kept) :], values[-len(kept) :]))
            for summaries in self._summaries.values():
                summaries.append(layer, PageRows(keys, self._received(layer, piece)))
        self.num_windows = window + 1
        self._num_resident += self._num_resident == window
        self._write_summaries()
        if self._is_only_resident:
            return
        encoded = [self.memory.put(layer, window, piece) for layer, piece in enumerate(fresh)]
        if self.records.write(self._packed(window, encoded, recompute_ms)):
            self._let_go()

    def adopt(self) -> int:
        """Count the next windows as there that are stored behind a gap, and return how many those are.

        A window before them may have left the disk alone; read again it has the same numbers, so they still hold.
        """
        first, stop = self.num_windows, self._first_gap(self.num_windows)
        while self.num_windows < stop:
            window = self.num_windows
            try:
                pieces = [self._piece(layer, window) for layer in range(self.num_layers)]
            except DamagedWindowError as damage:
                _log.warning("%s: its window is computed again", damage.cause)
                self._stored.discard(window)
                break
            for summaries in self._summaries.values():
                for layer, piece in enumerate(pieces):
                    keys = self.codec.decode_keys(layer, piece.to(self.device))
                    summaries.append(layer, PageRows(keys, self._received(layer, piece)))
            self.num_windows = window + 1
            self._write_summaries()
        return self.num_windows - first

    def replace(self, window: int, rows: Sequence[WindowRows], recompute_ms: float = 0.0) -> None:
        """Keep a window again that was damaged.

        Raises:
            KVCacheError: as for `append`.
        """
        self.cache.discard(range(self._first_page(window), self._first_page(window + 1)))
        self.memory.discard(window)
        encoded = [self.memory.put(layer, window, piece) for layer, piece in enumerate(self._encode(rows))]
        if self.resident is not None:
            for layer, piece in enumerate(encoded):
                self.resident.put(layer, self._first_page(window), piece)
        self.records.write(self._packed(window, encoded, recompute_ms))
        self.flush()
        self.repaired += 1

    def flush(self) -> None:
        """Write what is not written yet.

        Raises:
            KVCacheError: the disk could not be written.
        """
        self.records.flush()
        self._summary_records.flush()
        self._let_go()

    def bring(self, layer: int, pages: Sequence[int]) -> Tensor:
        """Return (pages,) int64, the blocks of the cache's pool that hold `pages` of a layer, brought where missing.

        They hold them until other pages of the layer are asked for.

        Raises:
            KVCacheError: a page is damaged and cannot be computed again.
            CacheCapacityError: so many pages do not fit there at once.
        """
        while True:
            missing = self.cache.missing(layer, pages)
            try:
                pieces = {window: self._piece(layer, window) for window in dict.fromkeys(map(self.window_of, missing))}
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
            window = self._num_resident
            try:
                for layer in range(self.num_layers):
                    self.resident.put(layer, self._first_page(window), self._piece(layer, window))
            except DamagedWindowError as damage:
                self._mend(damage)
                continue
            self._num_resident = window + 1

    def prefetch(self, layer: int, pages: Sequence[int]) -> Future[None] | None:
        """Start to read from disk what memory does not have of `pages`; None where that is nothing."""
        wanted = dict.fromkeys(self.window_of(page) for page in pages if not self.cache.holds(layer, page))
        places = [(layer, window) for window in wanted if not self.memory.holds(layer, window)]
        places = [place for place in places if place not in self._loading]
        if not places:
            return None
        self._loading.update(places)
        return self._loader.submit(self._load, places)

    def summaries(self, selector: PageSelector) -> PageSummaries:
        """Return what `selector` keeps of all pages that are there, made from the pages where it is new.

        Raises:
            KVCacheError: the selector needs what was not stored, or a page is damaged and cannot be computed again.
        """
        found = self._summaries.get(selector.selector_id)
        if found is not None:
            return found
        made = self._summaries[selector.selector_id] = PageSummaries(selector, self.num_layers)
        try:
            for windows in self._summary_records.sections():
                self._fill(made, windows)
            self._summary_records.flush()
        except BaseException:
            del self._summaries[selector.selector_id]
            raise
        return made

    def _fill(self, made: PageSummaries, windows: range) -> None:
        """Add the pages of a section, as far as they are there, from what is stored of it or from the pages."""
        if windows.start >= self.num_windows:
            return
        first, stop = self._first_page(windows.start), self._first_page(windows.stop)
        whole = windows.stop <= self.num_windows
        if whole and made.is_closed and self._summary_records.restore(made, windows, stop - first, self.device):
            return
        for window in range(windows.start, min(windows.stop, self.num_windows)):
            for layer in range(self.num_layers):
                made.append(layer, self._window_keys(layer, window))
        if whole:
            self._summary_records.write(made, windows, first, stop)

    def use(self, since: KVUse | None = None) -> KVUse:
        """Return what was used so far, or since an earlier call.

        `hits` are pages that were there, decoded or not, `misses` windows that had to be computed again; bytes are
        those of pages that were not there decoded.
        """
        total = KVUse(self.cache.hits + self.cache.misses, self.repaired, bytes_by_tier=dict(self._bytes))
        if since is None:
            return total
        moved = {tier: count - since.bytes_by_tier.get(tier, 0) for tier, count in self._bytes.items()}
        moved = {tier: count for tier, count in moved.items() if count}
        return KVUse(total.hits - since.hits, total.misses - since.misses, bytes_by_tier=moved)

    def window_of(self, page: int) -> int:
        """Return the window that a page belongs to."""
        return page * self.page_size // self.window_tokens

    def close(self) -> None:
        """Write what is not written, and let everything go. Closing twice is harmless."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        try:
            self.flush()
        finally:
            self.records.close()

    def _encode(self, rows: Sequence[WindowRows]) -> list[Tensor]:
        return [self.codec.encode(layer, one.keys, one.values, one.received) for layer, one in enumerate(rows)]

    def _packed(self, window: int, pieces: Sequence[Tensor], recompute_ms: float) -> EncodedKV:
        return EncodedKV.pack(
            self.refs[window], self.codec.codec_id, [piece.flatten() for piece in pieces], recompute_ms
        )

    @property
    def _is_only_resident(self) -> bool:
        """Whether nobody keeps pages but the device; what rows received is not kept there."""
        return self.resident is not None and self.records.tier is None and not self.codec.with_received

    def _window_keys(self, layer: int, window: int) -> PageRows:
        if self._is_only_resident:
            assert self.resident is not None
            return PageRows(self.resident.keys(layer, self._first_page(window), self._first_page(window + 1)))
        while True:
            try:
                piece = self._piece(layer, window)
            except DamagedWindowError as damage:
                self._mend(damage)
                continue
            keys = self.codec.decode_keys(layer, piece.to(self.device))
            return PageRows(keys, self._received(layer, piece))

    def _received(self, layer: int, piece: Tensor) -> Tensor | None:
        received = self.codec.received(layer, piece)
        return None if received is None else received.to(self.device)

    def _piece(self, layer: int, window: int) -> Tensor:
        """Return (pages, page_bytes) uint8 of one window in one layer, from memory or disk."""
        found = self.memory.get(layer, window)
        if found is not None:
            self._bytes[MEMORY] += found.nbytes
            return found
        try:
            data = self.records.layer(self.refs[window], layer)
        except KVMissError as error:
            raise DamagedWindowError(window, error) from error
        pages = self._first_page(window + 1) - self._first_page(window)
        if data.numel() != pages * self.codec.page_bytes(layer):
            short = KVMissError(MissReason.SHORT, f"window {window} has {data.numel()} bytes in layer {layer}")
            raise DamagedWindowError(window, short)
        self._bytes[DISK] += data.nbytes
        return self.memory.put(layer, window, data.view(pages, -1))

    def _row(self, pieces: dict[int, Tensor], page: int) -> Tensor:
        window = self.window_of(page)
        return pieces[window][page - self._first_page(window)]

    def _load(self, places: Sequence[tuple[int, int]]) -> None:
        for layer, window in places:
            try:
                if not self.memory.holds(layer, window):
                    self._piece(layer, window)
            except KVCacheError as error:  # whoever needs the page finds out, and has it computed again
                _log.info("window %d of a document was not read ahead: %s", window, error)
            finally:
                self._loading.discard((layer, window))

    def _mend(self, damage: DamagedWindowError) -> None:
        if self.repair is None:
            raise KVCacheError(f"{damage.cause}: the document has to be read again") from damage
        _log.warning("%s: its window is computed again", damage.cause)
        self.repair(damage.window)

    def _write_summaries(self) -> None:
        for windows in self._summary_records.sections():
            if windows.stop == self.num_windows:
                first, stop = self._first_page(windows.start), self._first_page(windows.stop)
                for summaries in self._summaries.values():
                    self._summary_records.write(summaries, windows, first, stop)

    def _let_go(self) -> None:
        if self.records.tier is None:
            return
        self.memory.let_go(range(self._first_unwritten, self.num_windows))
        self._first_unwritten = self.num_windows

    def _first_gap(self, window: int) -> int:
        """Return the first window from `window` on that is not stored."""
        while window in self._stored:
            window += 1
        return window

    def _first_page(self, window: int) -> int:
        return min(window * self.window_tokens // self.page_size, self.pages_for(self.total_tokens))
