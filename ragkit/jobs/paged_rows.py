"""Rows that read documents whole: those of a document are answered together over its pages, one document after another.

Between two outcomes no document is kept open, so whoever takes them may ask about any other meanwhile. Where that made
this one close, its rows begin again; their random numbers are their own, so they give the same answers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from threading import Event
from typing import TYPE_CHECKING

from ragkit.answers.paged_steps import completed_from_pages, open_document
from ragkit.answers.steps import ordered_timings, sampling_of
from ragkit.jobs.retrieved_rows import NOT_OF_A_ROW, PagedRow, failed
from ragkit.jobs.rows import RowOutcome
from ragkit.request import paged_document, stream

if TYPE_CHECKING:
    from ragkit.documents import WholeDocument
    from ragkit.generation.page_batch import PageBatch
    from ragkit.generation.page_request import PageRequest, PageResult
    from ragkit.generation.paging import PagedDocument
    from ragkit.parts import Parts


def paged_outcomes(parts: Parts, waiting: Sequence[PagedRow], stop: Event) -> Iterator[RowOutcome]:
    """Yield what becomes of every row, group after group, so that a document is found and opened once for all of its.

    What is wrong with a row is its outcome and stops no other. After `stop` no more is yielded, and what is under way
    is let go.

    Args:
        parts: store and models.
        waiting: the rows; their `number` must differ.
        stop: ends reading and answering.

    Raises:
        StoreError: the store cannot be read.
        OSError: pages cannot be read from the disk.
    """
    groups: dict[tuple[str, str], list[PagedRow]] = {}
    for one in waiting:
        groups.setdefault(one.group, []).append(one)
    for group in groups.values():
        yield from _group_outcomes(parts, group, stop)


def _group_outcomes(parts: Parts, group: Sequence[PagedRow], stop: Event) -> Iterator[RowOutcome]:
    """Yield what becomes of the rows about one document."""
    for place, paged in enumerate(group):
        if stop.is_set():
            return
        try:
            whole = paged_document(parts, paged.options)
            if whole is None:  # it was edited meanwhile, and is no longer too long for the window
                answer = stream(parts, paged.row.question, paged.options).answer
                cut = answer.tokens.generated >= paged.options.generation.max_new_tokens
                outcome = RowOutcome(paged.row, answer, cut=cut)
        except NOT_OF_A_ROW:
            raise
        except Exception as error:
            if stop.is_set():  # it may be what the row ended with; it is asked again
                return
            outcome = failed(paged.row, error)
        else:
            if whole is not None:
                yield from _Together(parts, whole, group[place:], stop).outcomes()
                return
        yield outcome


class _Together:
    """Rows about one document that was found. Not reusable."""

    def __init__(self, parts: Parts, whole: WholeDocument, group: Sequence[PagedRow], stop: Event) -> None:
        self._parts = parts
        self._whole = whole
        self._group = group
        self._stop = stop
        self._rows = {one.row.number: one for one in group}
        self._failed: deque[RowOutcome] = deque()  # rows that cannot be asked
        self._again: list[PageRequest] = []  # those that a batch had begun which went on no longer
        self._coming = self._asked()
        self._batch: PageBatch | None = None
        self._read_ms = 0.0  # of a document that was read for the next outcome

    def outcomes(self) -> Iterator[RowOutcome]:
        while not self._stop.is_set():
            try:
                opened, results = self._advanced()
            except NOT_OF_A_ROW:
                raise
            except Exception as error:  # the document cannot be opened or read: the next row tries again
                if self._stop.is_set():
                    return
                request = next(self._requests(), None)
                ended = [] if request is None else [failed(self._rows[request.name].row, error)]
            else:
                ended = [self._outcome(opened, result) for result in results]
            while self._failed:
                yield self._failed.popleft()
            yield from ended
            if not ended:
                return

    def _advanced(self) -> tuple[PagedDocument, list[PageResult]]:
        """Return the next questions that end; the document is open as long as that takes."""
        paging = self._parts.paging  # first: it imports torch
        from ragkit.generation.page_batch import PageBatch

        started = time.perf_counter()
        with open_document(self._parts, self._whole, self._group[0].options, self._stop) as (opened, was_read):
            if was_read:
                self._read_ms += 1e3 * (time.perf_counter() - started)
            if self._batch is None or self._batch.pages is not opened.pages:
                self._batch = PageBatch(
                    self._parts.engine, paging.prefill, opened.pages, self._requests(),
                    max_running=self._parts.config.batch.max_running, stop=self._stop,
                )  # fmt: skip
            return opened, self._batch.advance()

    def _requests(self) -> Iterator[PageRequest]:
        """Return what has no result yet; what runs begins again."""
        if self._batch is not None:
            self._again, self._batch = self._batch.let_go() + self._again, None
        return self._left()

    def _left(self) -> Iterator[PageRequest]:
        # Not `yield from`: a batch that is given up closes its own iterator, and the rows go on in the next one.
        while request := self._again.pop(0) if self._again else next(self._coming, None):
            yield request

    def _asked(self) -> Iterator[PageRequest]:
        from ragkit.generation.page_request import PageRequest

        for paged in self._group:
            try:
                builder = self._parts.engine.prompt_builder(paged.options.generation.system_prompt)
                token_ids = builder.ending(paged.row.question).token_ids
                request = PageRequest(paged.row.number, tuple(token_ids), sampling_of(paged.options))
            except NOT_OF_A_ROW:
                raise
            except Exception as error:
                self._failed.append(failed(paged.row, error))
            else:
                yield request

    def _outcome(self, opened: PagedDocument, result: PageResult) -> RowOutcome:
        paged, finished = self._rows[result.name], result.finished
        row, options = paged.row, paged.options
        if isinstance(result.error, NOT_OF_A_ROW):
            raise result.error
        if result.error is not None:
            return failed(row, result.error)
        assert finished is not None, "a result has an answer or an error"
        assert result.question is not None, "a result has an answer or an error"
        read_ms, self._read_ms = self._read_ms, 0.0
        laps = {"read_document": read_ms} if read_ms else {}
        laps |= {"prefill": finished.timings_ms["prefill"], "first_token": read_ms + finished.timings_ms["first_token"]}
        timings = ordered_timings(laps, 0.0, read_ms + finished.timings_ms["total"])
        try:
            answer = completed_from_pages(
                self._parts, row.question, self._whole, options, result.text, finished,
                opened.attended(result.question), timings_ms=lambda: timings,
            )  # fmt: skip
        except NOT_OF_A_ROW:
            raise
        except Exception as error:
            return failed(row, error)
        return RowOutcome(row, answer, cut=finished.reason == "length")
