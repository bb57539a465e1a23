"""Answers from KV pages: a document is read into pages once, and selectors are compared over the same stored pages."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ragkit.bench.long_answers import AnswererTools, LongAnswer, text_of
from ragkit.bench.long_items import CharSpan, LongQuestion
from ragkit.config import PagesConfig
from ragkit.generation.page_options import PageOptions
from ragkit.generation.paged_answer import PagedAnswer
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.paging import PagedDocument, PagedText, Paging
from ragkit.generation.sampling import SamplingConfig
from ragkit.kvcache.page_selector import Takes
from ragkit.kvcache.page_selectors import make_page_selector
from ragkit.types import document_id


def pages_answerers(tools: AnswererTools) -> list[PagesAnswerer]:
    """Return an answerer for each selector, budget and number of pages found first that is compared.

    They share one reading of each document, by the configured selector and budget, unless each is to read itself.
    """
    asked, config = tools.pages, tools.config.pages
    names = asked.selectors or (config.selector,)
    received = config.keep_received or any(make_page_selector(name).needs_received for name in names)
    shared = _Reader(tools, replace(config, keep_received=received), keep=True)
    answerers = []
    for name, budget, times in itertools.product(
        names, asked.budgets or (config.budget_tokens,), asked.found_times or (config.found_times,)
    ):
        own = replace(config, selector=name, budget_tokens=budget, found_times=times)
        if asked.own_prefill:
            own = replace(own, reading_selector=name, reading_found_times=times)
        reader = _Reader(tools, own, keep=False) if asked.own_prefill else shared
        parts = ["pages", str(name), *([f"{budget:,}"] if asked.budgets else [])]
        parts += [f"finds {times} times"] if asked.found_times else []
        parts += ["own prefill"] if asked.own_prefill else []
        answerers.append(PagesAnswerer(" ".join(parts), tools, reader, PageOptions.of(own)))
    return answerers


class _Reader:
    """Documents in pages, in memory (`pages.memory_mb`); one is open, and its reading was timed.

    Args:
        tools: the model.
        config: how documents are read.
        keep: whether a document stays open for the next answerer, until another is read.
    """

    def __init__(self, tools: AnswererTools, config: PagesConfig, *, keep: bool) -> None:
        self._tools = tools
        self._paging = Paging(tools.engine, config, tools.config.kv, None)
        self._keep = keep
        self._seconds = 0.0

    @property
    def reading(self) -> PageOptions:
        """What windows attend to while documents are read, or a damaged one is read again."""
        return self._paging.prefill.reading

    @contextmanager
    def read(self, document: str) -> Iterator[tuple[PagedDocument, float]]:
        """Give the document, read to its end, and the seconds that took."""
        name = document_id(document)
        text = PagedText(name, document, name)
        started = time.perf_counter()
        try:
            with self._paging.document(text, self._tools.config.generation.system_prompt) as opened:
                if not opened.pages.is_complete:
                    self._paging.read(opened)
                    self._seconds = time.perf_counter() - started
                yield opened, self._seconds
        finally:
            if not self._keep:
                self._paging.close()


class PagesAnswerer:
    """Answers as `ragkit query --strategy pages` does, the answer's beginning apart.

    Args:
        name: what results call it.
        tools: the model.
        reader: reads documents.
        options: what question and answer attend to.
    """

    def __init__(self, name: str, tools: AnswererTools, reader: _Reader, options: PageOptions) -> None:
        self._name = name
        self._tools = tools
        self._reader = reader
        self._options = options
        self._prefill = PagedPrefill(tools.engine.decoder, tools.engine.rotary, options, reader.reading)

    @property
    def name(self) -> str:
        """What results call it."""
        return self._name

    @property
    def most_tokens(self) -> int:
        """Any length goes that memory holds."""
        return 0

    def answer(self, document: str, questions: Sequence[LongQuestion], max_new_tokens: int) -> Iterator[LongAnswer]:
        """Yield what `LongContextAnswerer.answer` says; what a selector keeps of the pages counts as reading."""
        engine = self._tools.engine
        builder = engine.prompt_builder(self._tools.config.generation.system_prompt)
        with self._reader.read(document) as (opened, document_seconds):
            document_seconds += self._summarise(opened)
            for question in questions:
                started = time.perf_counter()
                begun = engine.tokenizer.encode(question.answer_prefix)
                ending = (*builder.ending(question.text).token_ids, *begun)
                answer = PagedAnswer(engine, self._prefill, opened.pages, ending, SamplingConfig(max_new_tokens))
                text = text_of(answer.steps())
                seconds = time.perf_counter() - started
                tokens = opened.pages.total_tokens + len(ending)
                yield LongAnswer(text, self._shown(opened, answer), tokens, document_seconds, seconds)

    def _summarise(self, opened: PagedDocument) -> float:
        """Let the selector see all pages, and return the seconds that took."""
        started = time.perf_counter()
        count = opened.pages.num_pages
        if self._options.selector.takes is Takes.BEST and self._options.pages_at_once(count) < count:
            opened.pages.summaries(self._options.selector)
        return time.perf_counter() - started

    def _shown(self, opened: PagedDocument, answer: PagedAnswer) -> tuple[CharSpan, ...]:
        """Return the characters of all pages that any layer attended to, neighbours joined."""
        count, options = opened.pages.num_pages, self._options
        always = {*range(min(options.sink_pages, count)), *range(max(0, count - options.local_pages), count)}
        if options.pages_at_once(count) == count:
            always = set(range(count))
        answer.times_chosen.update(always)  # nobody else looks at this answer: those count like chosen ones
        answer.choices = max(1, answer.choices)
        spans: list[CharSpan] = []
        for one in sorted(opened.attended(answer, count), key=lambda one: one.char_start):
            if spans and one.char_start <= spans[-1][1]:
                spans[-1] = spans[-1][0], max(one.char_stop, spans[-1][1])
            else:
                spans.append((one.char_start, one.char_stop))
        return tuple(spans)
