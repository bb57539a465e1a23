"""Reading the windows of a long document as CUDA graphs, where a GPU holds all of its pages.

From some windows on every window is the same work: as many tokens, as many pages that are found and attended to. What
differs is how many pages stand before it, and that is a number on the device: pages are scored up to there, and the
window's own are written behind. A window has a thousand launches, which take the host longer than the device takes to
run them; replayed they are one. Scoring looks at the room for pages, so a graph serves until twice as many are there
as when it was recorded, and then another one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ragkit.config import PagePositions
from ragkit.generation.decoder import Decoder
from ragkit.generation.graph_recorder import Recorder
from ragkit.generation.page_attention import PageAttention
from ragkit.generation.page_lists import PageLayout
from ragkit.generation.page_options import PageOptions
from ragkit.generation.put_ids import put_ids
from ragkit.kernels.backend import next_power_of_2
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_selector import ScoresWithin
from ragkit.kvcache.window_writer import WindowWriter

_LEAST_PAGES = 1024  # that a window looks at, there or not: to look at fewer is no faster
_LEAST_WINDOWS = 8  # that are left: recording one takes as long as launching two


class WindowGraph:
    """Reads windows of one document, in order, behind those that were read otherwise.

    Args:
        decoder: the model.
        pages: the document.
        options: what every window attends to.
        attention: makes the attention of a window of `pages` with a writer, which looks at so many pages.
        recorder: records windows.
    """

    def __init__(
        self,
        decoder: Decoder,
        pages: KVPages,
        options: PageOptions,
        attention: Callable[[WindowWriter, int], PageAttention],
        recorder: Recorder,
    ) -> None:
        self._decoder = decoder
        self._pages = pages
        self._options = options
        self._attention = attention
        self._recorder = recorder
        self._summaries = pages.summaries(options.selector)
        self._writer = WindowWriter(pages, self._summaries)
        self._tokens = torch.zeros(pages.window_tokens, dtype=torch.int64, device=pages.device)
        self._own = torch.arange(pages.window_tokens, device=pages.device)
        self._attend: PageAttention | None = None
        self._replay: Callable[[], object] | None = None
        self._most = 0  # pages that the recorded window looks at
        self._ended = time.perf_counter()

    @staticmethod
    def pays(pages: KVPages, options: PageOptions) -> bool:
        """Return whether the windows that are left of a document can be read so, and are as many as are worth it."""
        can_choose = isinstance(options.selector, ScoresWithin) and options.keep_similarity >= 1
        if not (pages.takes_coming and can_choose) or options.positions is PagePositions.TRUE:
            return False
        if not PageLayout.of(pages.num_tokens, options).is_steady:
            return False
        left = pages.total_tokens // pages.window_tokens - pages.num_windows
        return left >= _LEAST_WINDOWS and pages.summaries(options.selector).has_room(pages.grid.num_pages)

    def read(self, token_ids: Sequence[int]) -> bool:
        """Read the next window; return False where it is not a whole one, and was not.

        Raises:
            KVCacheError: an earlier window cannot be stored.
        """
        pages, writer = self._pages, self._writer
        if len(token_ids) < pages.window_tokens:
            return False
        pages.bring_windows(pages.num_windows)
        put_ids(token_ids, self._tokens)
        writer.start()
        self._recorder.begin()
        if self._replay is None or pages.num_pages > self._most:
            self._record()
        else:
            self._replay()
        self._recorder.end()
        now = time.perf_counter()
        writer.finish(1e3 * (now - self._ended))
        self._ended = now
        return True

    def close(self) -> None:
        """Wait for the last window and let recorded ones go: their memory goes to somebody else."""
        self._recorder.wait()
        self._replay = self._attend = None

    def _record(self) -> None:
        self._recorder.wait()
        before = self._attend, self._replay  # the memory that graphs share goes with the last one: not before the next
        most = max(_LEAST_PAGES, next_power_of_2(self._pages.num_pages + 1))
        self._most = min(self._pages.grid.num_pages, most)
        self._attend = self._attention(self._writer, self._most)
        self._replay = self._recorder.record(self._work)
        del before

    def _work(self) -> None:
        assert self._attend is not None, "made before"
        self._attend.begin_at(self._own, choose=True)
        projected = self._decoder.run_to_last(self._tokens, self._attend)
        self._writer.write(self._pages.num_layers - 1, projected.keys, projected.values)
