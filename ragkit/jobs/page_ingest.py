"""Long documents read into pages ahead. What is stored is not read again, so it can be stopped anywhere and goes on."""

from __future__ import annotations

from threading import Event

from ragkit.documents import long_documents
from ragkit.errors import CacheCapacityError, UsageError
from ragkit.generation.paging import PagedText, price_line
from ragkit.parts import Parts
from ragkit.progress import Progress
from ragkit.reports import PageIngestReport


class PageIngest:
    """One run over the documents of a store that are longer than the generator's window. Not reusable.

    Args:
        parts: the store and the models.
        progress: hears each document's price before it is begun, and its advance.
        stop: ends reading behind the running window.
    """

    def __init__(self, parts: Parts, progress: Progress, stop: Event | None = None) -> None:
        self._parts = parts
        self._progress = progress
        self._stop = stop or Event()

    def run(self) -> tuple[PageIngestReport, tuple[str, ...]]:
        """Read what is missing; return what was done, and a warning for each document that does not fit.

        Raises:
            UsageError: there is no place for pages.
            KVCacheError: the disk could not be written.
        """
        parts = self._parts
        if not parts.config.kv.disk_mb:
            raise UsageError("there is no place for the pages of documents: set kv.disk_mb above 0")
        read = present = tokens = nbytes = 0
        warnings: list[str] = []
        generation, paging = parts.config.generation, parts.paging
        for whole in long_documents(parts.store, parts.engine.max_context - generation.max_new_tokens):
            if self._stop.is_set():
                break
            text = PagedText(whole.document.doc_id, whole.document.text, whole.chunks[0].chunk_id)
            try:
                with paging.document(text, generation.system_prompt) as opened:
                    if opened.pages.is_complete:
                        present += 1
                        continue
                    price, pages = paging.price(opened), opened.pages
                    self._progress.message(price_line(whole.uri, price))
                    before = pages.num_tokens
                    read += paging.read(opened, self._progress, self._stop)
                    tokens += pages.num_tokens - before
                    nbytes += price.nbytes * (pages.num_tokens - before) // max(1, price.tokens)
            except CacheCapacityError as error:
                warnings.append(f"{whole.uri} was not read into pages: {error}")
        return PageIngestReport(read, present, tokens, nbytes), tuple(warnings)
