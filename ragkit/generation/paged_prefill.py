"""Reading a document of any length: window by window, each attends to sinks, found pages and the local window.

The work grows with the document's length and not with its square, positions stay within the window that the model was
trained on, and the question plays no part: what is stored serves every question. With every page attended to, it is
full prefill. Windows that are stored already are not read again, so reading goes on where it was interrupted.

Source: InfLLM, arXiv 2402.04617, section 3; looking pages up while reading, not only while answering, took its KV
retrieval from 85.2 to 96.8 (table of ablations). Its published code puts every page at one distance and waits for the
device in every window and layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Event

import torch

from ragkit.errors import KVCacheError
from ragkit.generation.decoder import Decoder
from ragkit.generation.graph_recorder import GraphRecorder, Recorder
from ragkit.generation.page_attention import PageAttention
from ragkit.generation.page_options import PageOptions
from ragkit.generation.put_ids import put_ids
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.window_graph import WindowGraph
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_selector import Takes
from ragkit.kvcache.page_window import WindowRows
from ragkit.kvcache.window_writer import WindowWriter
from ragkit.progress import Progress, Silent


class PagedPrefill:
    """Reads documents with one model.

    Args:
        decoder: the model.
        rotary: its rotary tables.
        options: what questions and answers attend to.
        reading: what every window attends to; the same where left out.
        make_recorder: makes what records windows; None takes CUDA graphs on a GPU.
    """

    def __init__(
        self,
        decoder: Decoder,
        rotary: RotaryCache,
        options: PageOptions,
        reading: PageOptions | None = None,
        make_recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        self.options = options
        self.reading = reading or options
        self._decoder = decoder
        self._rotary = rotary
        if make_recorder is None and decoder.device.type == "cuda":
            make_recorder = partial(GraphRecorder, decoder.device)
        self._make_recorder = make_recorder

    @torch.inference_mode()
    def read(self, pages: KVPages, progress: Progress | None = None, stop: Event | None = None) -> bool:
        """Read what is missing of a document, and return whether all of it is there now.

        What was read is written when this returns, also where it is stopped or fails.

        Args:
            pages: the document.
            progress: hears of windows and tokens.
            stop: ends reading behind the running window.

        Raises:
            GenerationError: windows and what they attend to do not fit the model's window.
            KVCacheError: the disk could not be written, or a stored window is damaged beyond repair.
        """
        progress = progress or Silent()
        self._require_room(pages)
        with pages.lock:
            pages.repair = lambda window: self._repair(pages, window)
            left = len(pages.refs) - pages.num_windows
            missing = pages.pages_for(pages.total_tokens) - pages.num_pages
            progress.start(left, missing * pages.codec.bytes_per_page, "windows")
            graph: WindowGraph | None = None
            try:
                while not pages.is_complete and not (stop is not None and stop.is_set()):
                    if adopted := pages.adopt():
                        progress.advance(documents=adopted)
                        continue
                    graph = graph or self._graph(pages)
                    token_ids = pages.refs[pages.num_windows].token_ids
                    if graph is None or not graph.read(token_ids):
                        started = time.perf_counter()
                        rows = self._rows(pages, pages.num_windows)
                        pages.append(rows, 1e3 * (time.perf_counter() - started))
                    nbytes = pages.codec.bytes_per_page * pages.pages_for(len(token_ids))
                    progress.advance(documents=1, bytes=nbytes, tokens=len(token_ids))
            finally:
                try:
                    if graph is not None:
                        graph.close()
                finally:
                    pages.flush()
        return pages.is_complete

    def prepare(self, pages: KVPages) -> None:
        """Make what questions find the pages of a document by that was read, and let go what reading found them by.

        Raises:
            KVCacheError: a page is damaged and cannot be computed again.
        """
        count, asking = pages.num_pages, self.options.selector
        with pages.lock:
            if self.reading.selector.selector_id != asking.selector_id:
                pages.forget_summaries(self.reading.selector)
            if asking.takes is Takes.BEST and self.options.pages_at_once(count) < count:
                pages.summaries(asking)

    def attention(self, pages: KVPages, own_tokens: int) -> PageAttention:
        """Return the attention of a question and its answer, `own_tokens` together, behind a document.

        Raises:
            KVCacheError: the document was not read to its end.
            GenerationError: so many positions do not fit the model's window.
        """
        if not pages.is_complete:
            raise KVCacheError(
                f"{pages.num_windows:,} of {len(pages.refs):,} windows of the document were read: read the rest first"
            )
        self.options.require_room(pages.total_tokens, own_tokens, self._decoder.config.max_context)
        pages.repair = lambda window: self._repair(pages, window)
        return self._attention(pages, self.options, pages.total_tokens, own_tokens)

    def _rows(self, pages: KVPages, window: int) -> Sequence[WindowRows]:
        """Return the rows of a window, read behind those before it."""
        token_ids = pages.refs[window].token_ids
        before = window * pages.window_tokens
        attend = self._attention(pages, self.reading, before, len(token_ids), keep_rows=True)
        attend.begin(len(token_ids), choose=True)
        room = torch.empty(len(token_ids), dtype=torch.int64, device=self._decoder.device)
        projected = self._decoder.run_to_last(put_ids(token_ids, room), attend)
        if pages.codec.with_received:
            attend(pages.num_layers - 1, projected.queries, projected.keys, projected.values)
        else:
            attend.rows.append(WindowRows(projected.keys, projected.values))
        return attend.rows

    def _graph(self, pages: KVPages) -> WindowGraph | None:
        """Return what reads the next windows as CUDA graphs, where that can be and pays."""
        if self._make_recorder is None or not WindowGraph.pays(pages, self.reading):
            return None

        def attention(writer: WindowWriter, most_pages: int) -> PageAttention:
            before, own = pages.num_tokens, pages.window_tokens
            return self._attention(
                pages, self.reading, before, own, keep_rows=True, writer=writer, most_pages=most_pages
            )  # fmt: skip

        return WindowGraph(self._decoder, pages, self.reading, attention, self._make_recorder())

    def _repair(self, pages: KVPages, window: int) -> None:
        started = time.perf_counter()
        rows = self._rows(pages, window)
        pages.replace(window, rows, 1e3 * (time.perf_counter() - started))

    def _attention(
        self,
        pages: KVPages,
        options: PageOptions,
        num_tokens: int,
        own_tokens: int,
        *,
        keep_rows: bool = False,
        writer: WindowWriter | None = None,
        most_pages: int = 0,
    ) -> PageAttention:
        # Scoring turns queries by a local window, also where less stands before them; and the rows of a last page that
        # is not full are turned as well, although nobody sees them.
        behind = max(own_tokens, options.page_size)
        positions = max(options.positions_before(num_tokens) + behind, options.score_distance + 1)
        rotary = self._rotary.table(positions, positions)
        before, scale = pages.use(), self._decoder.scale
        pages.bring_windows(-(-num_tokens // pages.window_tokens))
        attend = PageAttention(
            pages, options, rotary, scale, num_tokens, own_tokens,
            keep_rows=keep_rows, writer=writer, most_pages=most_pages,
        )  # fmt: skip
        attend.use += pages.use(before)  # also what a selector keeps was read from somewhere
        return attend

    def _require_room(self, pages: KVPages) -> None:
        longest = min(self.reading.window_tokens, pages.total_tokens)
        before = max(0, (len(pages.refs) - 1) * self.reading.window_tokens)
        self.reading.require_room(before, longest, self._decoder.config.max_context)
