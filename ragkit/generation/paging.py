"""Documents in pages for one engine and one store: opened, read where they are not yet, and answered from."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

import torch

from ragkit.config import KVConfig, PagesConfig
from ragkit.errors import CacheCapacityError, GenerationError, KVCacheError
from ragkit.generation.chunk_prefill import expected_attention_s, expected_cost
from ragkit.generation.engine import Engine
from ragkit.generation.page_options import PageOptions
from ragkit.generation.paged_answer import PagedAnswer
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.paged_question import PagedQuestion
from ragkit.generation.sampling import SamplingConfig
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.kv_segment import RECORD_OVERHEAD
from ragkit.kvcache.page_cache import PageCache
from ragkit.kvcache.page_codec import PageCodec
from ragkit.kvcache.page_memory import PageMemory
from ragkit.kvcache.page_records import PageRecords, window_refs
from ragkit.kvcache.page_summary_shapes import PageSummaryShapes
from ragkit.kvcache.page_tokens import TextTokens, TokenRecords
from ragkit.kvcache.resident_pages import ResidentPages
from ragkit.kvcache.segment_tier import KVCatalogue, SegmentTier
from ragkit.models.fingerprint import weights_fingerprint, weights_stamp
from ragkit.progress import Progress
from ragkit.store.records import document_owner
from ragkit.types import AttendedSpan

_LARGEST_SHARE = 0.7  # of the disk's budget that one document may take: the tier keeps a quarter free when it evicts
_LISTED_SPANS = 32
_LARGEST_FREE_SHARE = 0.8  # of a GPU's free memory that pages may take: attention and activations need the rest
_LARGEST_KEPT_SHARE = 0.9  # that pages and what selectors keep of them may take together
_LEAST_BLOCK = 16  # rows of a block, and of a group of them, that kernels read

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PagedText:
    """A document of a store that is answered from its pages.

    Attributes:
        doc_id: its identity.
        text: the whole text.
        owner: the chunk of the catalogue with which its pages go.
    """

    doc_id: str
    text: str
    owner: str


@dataclass(frozen=True, slots=True)
class Price:
    """What reading the rest of a document takes: tokens, bytes, and about how many seconds."""

    tokens: int
    nbytes: int
    seconds: float


def price_line(uri: str, price: Price) -> str:
    """Return what reading a document takes, for people, before it is begun."""
    hours, minutes = divmod(max(1, round(price.seconds / 60)), 60)
    time = f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return (
        f"reading {uri} into pages: {price.tokens:,} tokens, {price.nbytes / 1e6:,.0f} MB, about {time}; later "
        "questions find them, and reading that was interrupted goes on where it stopped"
    )


class PagedDocument:
    """One document, opened: its pages, and which characters its tokens stand for.

    Attributes:
        document: what it is.
        pages: its pages.
    """

    def __init__(self, document: PagedText, pages: KVPages, before: int, tokens: TextTokens) -> None:
        self.document = document
        self.pages = pages
        self._before = before  # tokens of the prompt's prefix
        self._tokens = tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, without what stands around it in the prompt."""
        return len(self._tokens.ids)

    def attended(self, question: PagedQuestion, most: int = _LISTED_SPANS) -> tuple[AttendedSpan, ...]:
        """Return the pages that an answer found, which has ended, most often chosen first."""
        spans: list[AttendedSpan] = []
        size = self.pages.page_size
        for page, count in sorted(question.times_chosen.items(), key=lambda item: (-item[1], item[0])):
            start, stop = max(page * size - self._before, 0), min((page + 1) * size - self._before, self.num_tokens)
            if start < stop and len(spans) < most:
                share = count / question.choices
                first, last = int(self._tokens.starts[start]), int(self._tokens.stops[stop - 1])
                spans.append(AttendedSpan(start, stop, first, last, share))
        return tuple(spans)


class Paging:
    """Answers from documents in pages. One document is open at a time; questions about others wait.

    A document is read behind the model's prompt prefix and without the question. Where the weights on disk are not
    those that the engine loaded, no key could name its pages, so they stay in memory.

    Args:
        engine: the model.
        config: how documents are read.
        kv: the disk's budget.
        store: where pages are kept; None keeps them in memory.

    Attributes:
        prefill: reads documents.
    """

    def __init__(self, engine: Engine, config: PagesConfig, kv: KVConfig, store: KVCatalogue | None) -> None:
        decoder = engine.decoder
        self._engine = engine
        self._config = config
        self._store = store
        options, reading = PageOptions.of(config), PageOptions.of(config, reading=True)
        needs = options.selector.needs_received or reading.selector.needs_received
        self._codec = PageCodec(
            config.codec, decoder.layout, config.page_tokens, with_received=config.keep_received or needs
        )  # fmt: skip
        self._recipe = KVRecipe(
            weights_fingerprint=weights_fingerprint(engine.folder),
            config=decoder.config,
            tokenizer_id=engine.tokenizer.tokenizer_id,
            dtype=decoder.dtype,
            codec_id=self._codec.codec_id,
        )
        self._tier: SegmentTier | None = None
        if store is not None and kv.disk_mb:
            # Compared after hashing: files that were replaced before or meanwhile are not those in memory.
            if weights_stamp(engine.folder) == engine.weights_stamp:
                self._tier = SegmentTier(store, kv.disk_mb << 20, make_policy(kv.policy))
            else:
                _log.warning(
                    "the weights in %s were replaced since they were loaded: pages stay in memory", engine.folder
                )
        self.prefill = PagedPrefill(decoder, engine.rotary, options, reading)
        self._changed = threading.Condition()
        self._users: Counter[int] = Counter()  # threads that began to use the open document
        self._open: tuple[tuple[str, str], PagedDocument] | None = None

    @contextmanager
    def document(self, document: PagedText, system_prompt: str = "") -> Iterator[PagedDocument]:
        """Give a document, opened; it stays so until the block ends.

        Raises:
            CacheCapacityError: it is larger than the budgets.
            GenerationError: this thread has an answer from another document that is not finished.
        """
        name, thread = (document.doc_id, system_prompt), threading.get_ident()
        with self._changed:
            while self._users and self._open is not None and self._open[0] != name:
                if thread in self._users:
                    raise GenerationError(
                        "an answer from another document's pages is not finished: read it to its end, or close its "
                        "stream, before the next"
                    )
                self._changed.wait()
            if self._open is None or self._open[0] != name:
                self._close_document()
                self._open = name, self._opened(document, system_prompt)
            opened = self._open[1]
            self._users[thread] += 1
        try:
            yield opened
        finally:
            with self._changed:
                self._users -= Counter((thread,))
                self._changed.notify_all()

    def price(self, document: PagedDocument) -> Price:
        """Return what reading the rest of a document takes; the time is guessed from the model's size."""
        pages = document.pages
        tokens = pages.total_tokens - pages.num_tokens
        nbytes = (pages.pages_for(pages.total_tokens) - pages.num_pages) * self._codec.bytes_per_page
        windows = len(pages.refs) - pages.num_windows
        options, decoder = self.prefill.reading, self._engine.decoder
        rows = (
            options.pages_at_once(pages.pages_for(pages.total_tokens)) * options.page_size + options.window_tokens / 2
        )
        seconds = expected_cost(decoder).seconds(tokens, windows) + tokens * expected_attention_s(decoder, rows)
        return Price(tokens, nbytes, seconds)

    def read(self, document: PagedDocument, progress: Progress | None = None, stop: Event | None = None) -> bool:
        """Read what is missing of a document and return whether all of it is there, as `PagedPrefill.read` does.

        What questions are going to be answered by is kept of its pages as well, so that the first need not wait for it.
        """
        pages = document.pages
        if pages.is_complete:
            return True
        if not self.prefill.read(pages, progress, stop):
            return False
        self.prefill.prepare(pages)
        return True

    def answer(
        self, document: PagedDocument, question: str, sampling: SamplingConfig, system_prompt: str = ""
    ) -> PagedAnswer:
        """Return the answer to a question about a document that was read, not generated yet.

        Raises:
            GenerationError: question and pages do not fit the model's window.
        """
        ending = self._engine.prompt_builder(system_prompt).ending(question).token_ids
        return PagedAnswer(self._engine, self.prefill, document.pages, ending, sampling)

    def forget_removed(self) -> None:
        """Drop the open document if it has left the store and nobody uses it."""
        with self._changed:
            if self._open is None or self._store is None or self._users:
                return
            owner = self._open[1].document.owner
            if owner not in self._store.known_chunks([owner]):
                self._close_document()

    def close(self) -> None:
        """Write what is unsaved and let the document go."""
        with self._changed:
            self._close_document()

    def _close_document(self) -> None:
        if self._open is not None:
            (_, document), self._open = self._open, None
            try:
                document.pages.close()
            except KVCacheError as error:  # pages that are not written are computed again: no later question needs them
                _log.warning("the last pages of a document were not written: %s", error)

    def _opened(self, document: PagedText, system_prompt: str) -> PagedDocument:
        engine, options = self._engine, self.prefill.reading
        builder = engine.prompt_builder(system_prompt)
        owner = document_owner(document.owner)
        tokens = self._tokens_of(document.text, owner)
        prefix = builder.prefix.token_ids
        token_ids = (*prefix, *tokens.ids.tolist(), *builder.chunk_end)
        refs = window_refs(self._recipe, options.reading_id, token_ids, options.window_tokens, owner)
        records = PageRecords(self._tier, self._codec.codec_id, engine.decoder.config.num_layers)
        memory = PageMemory(self._config.memory_mb << 20, page_locked=engine.decoder.device.type == "cuda")
        num_pages = -(-len(token_ids) // options.page_size)
        resident = self._resident(num_pages)
        if resident is None or self._tier is not None or self._codec.with_received:
            self._require_room(len(token_ids))
        cache = self._cache(num_pages) if resident is None else self._no_cache()
        pages = KVPages(self._codec, refs, options.window_tokens, cache, memory, records, resident)
        return PagedDocument(document, pages, len(prefix), tokens)

    def _tokens_of(self, text: str, owner: str) -> TextTokens:
        """Return the tokens of a document as they are stored, or made now and stored."""
        tokenizer = self._engine.tokenizer
        records = TokenRecords(self._tier, tokenizer.tokenizer_id)
        found = records.load(text, owner)
        if found is not None:
            return found
        started = time.perf_counter()
        tokens = TextTokens.of(*tokenizer.encode_with_offsets(text))
        records.save(text, owner, tokens, 1e3 * (time.perf_counter() - started))
        return tokens

    def _resident(self, num_pages: int) -> ResidentPages | None:
        """Return room for all pages on the GPU, where there is as much to spare."""
        device, size = self._engine.decoder.device, self._config.page_tokens
        nbytes = num_pages * self._codec.bytes_per_page
        fits_blocks = min(size, self._codec.group) >= _LEAST_BLOCK
        if device.type != "cuda" or not fits_blocks or nbytes > self._config.gpu_mb << 20:
            return None
        # What finds the pages lies there as well, and is made at the end of reading: then it would be too late.
        needed = max(nbytes / _LARGEST_FREE_SHARE, (nbytes + self._summary_bytes(num_pages)) / _LARGEST_KEPT_SHARE)
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            torch.cuda.empty_cache()  # what the document before took is free for nobody else until then
            free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            _log.info("a document's pages take %d MB, and %d MB of the GPU are free", nbytes >> 20, free >> 20)
            return None
        return ResidentPages(self._codec, num_pages, device)

    def _summary_bytes(self, num_pages: int) -> int:
        """Return the bytes of what selectors keep of so many pages: where not all are attended to, they are scored."""
        both = (self.prefill.options, self.prefill.reading)
        scoring = [one.selector for one in both if one.pages_at_once(num_pages) < num_pages]
        selectors = {one.selector_id: one for one in scoring}.values()
        layout, size = self._engine.decoder.layout, self._config.page_tokens
        return sum(PageSummaryShapes(one, layout, size).nbytes(num_pages) for one in selectors)

    def _no_cache(self) -> PageCache:
        decoder = self._engine.decoder
        return PageCache(decoder.layout, self._config.page_tokens, 1, 0, decoder.device)

    def _cache(self, num_pages: int) -> PageCache:
        layout, size = self._engine.decoder.layout, self._config.page_tokens
        fitting = (self._config.cache_mb << 20) // (layout.bytes_per_token * size)
        heads = max(spec.num_kv_heads for spec in layout.layers)
        asking, reading = (one.pages_needed(num_pages, heads) for one in (self.prefill.options, self.prefill.reading))
        wanted = max(asking, reading)
        if fitting < wanted:
            of = "reading_" if reading > asking else ""
            megabytes = -(-wanted * size * layout.bytes_per_token >> 20)
            raise CacheCapacityError(
                f"{wanted:,} pages of each layer are needed at once, {megabytes:,} MB decoded, and pages.cache_mb is "
                f"{self._config.cache_mb:,}: raise it, lower pages.budget_tokens or pages.{of}found_times, or take "
                f"another pages.{of}selector"
            )
        return PageCache(layout, size, max(1, min(fitting, num_pages)), 0, self._engine.decoder.device)

    def _require_room(self, num_tokens: int) -> None:
        nbytes = -(-num_tokens // self._config.page_tokens) * self._codec.bytes_per_page
        nbytes += -(-num_tokens // self._config.window_tokens) * RECORD_OVERHEAD
        if self._tier is None:
            setting, budget = "pages.memory_mb", self._config.memory_mb << 20
        else:
            setting, budget = "kv.disk_mb", int(self._tier.budget_bytes * _LARGEST_SHARE)
        if nbytes > budget:
            raise CacheCapacityError(
                f"the pages of this document of {num_tokens:,} tokens take {-(-nbytes >> 20):,} MB as "
                f"{self._config.codec}, and {setting} leaves {budget >> 20:,} MB for one document: raise it, or take "
                f"pages.codec = {'int4' if self._config.codec != 'int4' else 'int4 and a smaller document'}"
            )
