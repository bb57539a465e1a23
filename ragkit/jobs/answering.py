"""Many questions answered together: retrieved ahead in a thread of its own, generated in one batch, cited.

What an answer consists of is `ragkit.answers.steps`, the same as for one question; so are the answers.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Protocol

from ragkit.answers.steps import PreparedQuestion, completed, generation_laps, ordered_timings, prepare
from ragkit.config import Strategy
from ragkit.drafting import drafting_for
from ragkit.jobs.paged_rows import paged_outcomes
from ragkit.jobs.retrieved_rows import NOT_OF_A_ROW, FoundRow, PagedRow, RetrievedRow, RowRetrieval, failed
from ragkit.jobs.rows import QuestionRow, RowOutcome

if TYPE_CHECKING:
    from ragkit.generation.batch_request import BatchRequest, BatchResult
    from ragkit.generation.speculative_decode import Drafting
    from ragkit.parts import Parts

# Outcomes that need no generation wait for the next generated one; a long run of them ends the batch at hand instead.
_WAITING_OUTCOMES = 256
# Rows that read a document in pages wait for all others, but no more of them than this, so that memory is bounded.
_WAITING_PAGED = 4096


class BatchGenerator(Protocol):
    """Generates for many requests at once; `ragkit.generation.batch_engine.BatchEngine` does."""

    def run(self, requests: Iterable[BatchRequest]) -> Iterator[BatchResult]:
        """Yield one result a request, as they end; requests are pulled as there is room for them."""
        ...


@dataclass(frozen=True, slots=True)
class _Running:
    """A row whose prompt is with the generator."""

    found: FoundRow
    prepared: PreparedQuestion
    drafting: Drafting | None


def answer_many(
    parts: Parts, rows: Iterable[QuestionRow], *, generator: BatchGenerator | None = None, stop: Event | None = None
) -> Iterator[RowOutcome]:
    """Yield what becomes of every row once, in the order in which they end; rows are pulled as they are needed.

    What is wrong with a row is its outcome and stops no other. Rows that read one document in pages come last, or when
    some thousands of them wait, those of the same document together.

    Args:
        parts: store and models, loaded here where they are not there yet.
        rows: what is asked; their `number` must differ.
        generator: generates; a batch engine over `parts` where left out.
        stop: when set, no more is started and what is under way is let go.

    Raises:
        StoreError: the store cannot be read.
        RagkitError: a model cannot be loaded, or the batch cannot go on.
    """
    yield from _Answering(parts, generator or batch_generator(parts), stop or Event()).run(iter(rows))


class _StoppedError(Exception):
    """Leaves a batch that was asked to stop."""


class _Answering:
    """One run over rows. Not reusable."""

    def __init__(self, parts: Parts, generator: BatchGenerator, stop: Event) -> None:
        self._parts = parts
        self._generator = generator
        self._stop = stop
        self._done: deque[RowOutcome] = deque()
        self._running: dict[str, _Running] = {}
        self._paged: list[PagedRow] = []

    def run(self, rows: Iterator[QuestionRow]) -> Iterator[RowOutcome]:
        with RowRetrieval(self._parts) as retrieval:
            steps = retrieval.run(rows)
            exhausted = False
            while not exhausted and not self._stop.is_set():
                requests = _Requests(self._requests(steps))
                with contextlib.suppress(_StoppedError):
                    for result in self._generator.run(requests):
                        yield self._outcome(result)
                        yield from self._drained()
                        if self._stop.is_set():
                            return
                yield from self._drained()
                exhausted = requests.source_ended
                if len(self._paged) >= _WAITING_PAGED:
                    yield from self._paged_outcomes()
        yield from self._paged_outcomes()

    def _paged_outcomes(self) -> Iterator[RowOutcome]:
        waiting, self._paged = self._paged, []
        yield from paged_outcomes(self._parts, waiting, self._stop)

    def _drained(self) -> Iterator[RowOutcome]:
        while self._done:
            yield self._done.popleft()

    def _requests(self, steps: Iterator[RetrievedRow]) -> Iterator[BatchRequest | None]:
        """Yield what is to be generated; None where the batch should end so that what waits can be handed on."""
        from ragkit.generation.batch_request import BatchRequest

        for step in steps:
            if self._stop.is_set():
                raise _StoppedError  # through the generator: what it has pulled and not begun must not be begun either
            if isinstance(step, PagedRow):
                self._paged.append(step)
                if len(self._paged) >= _WAITING_PAGED:
                    yield None
                continue
            ready = self._prepared(step) if isinstance(step, FoundRow) else step
            if isinstance(ready, _Running):
                prepared, name = ready.prepared, str(ready.found.row.number)
                self._running[name] = ready
                prompt, sampling = prepared.built.prompt, prepared.sampling
                yield BatchRequest(name, prompt, sampling, prepared.prefill, prepared.ratio, ready.drafting)
                continue
            self._done.append(ready)
            if len(self._done) >= _WAITING_OUTCOMES:
                yield None

    def _prepared(self, found: FoundRow) -> _Running | RowOutcome:
        """Return the row with its prompt. Not in the thread that retrieves: models are loaded here when first used."""
        try:
            prepared = prepare(self._parts, found.row.question, found.hits, found.options)
            if prepared.strategy is Strategy.BLEND:
                self._parts.blending.follow(found.generation)
            drafting = drafting_for(self._parts, prepared)
        except NOT_OF_A_ROW:
            raise
        except Exception as error:
            return failed(found.row, error)
        return _Running(found, prepared, drafting)

    def _outcome(self, result: BatchResult) -> RowOutcome:
        running = self._running.pop(result.request_id)
        row, finished, before = running.found.row, result.finished, running.found.retrieve_ms
        if finished is None:
            assert result.error is not None, "a result has an answer or an error"
            return failed(row, result.error)
        laps = {"retrieve": before, **generation_laps(finished)}
        laps["first_token"] = before + finished.timings_ms["first_token"]
        timings = ordered_timings(laps, 0.0, before + finished.timings_ms["total"])
        try:
            answer = completed(self._parts, running.prepared, result.text, finished, lambda: timings)
        except NOT_OF_A_ROW:
            raise
        except Exception as error:
            return failed(row, error)
        return RowOutcome(row, answer, cut=finished.reason == "length")


class _Requests:
    """Requests up to the next None, and whether there are more behind it."""

    def __init__(self, requests: Iterator[BatchRequest | None]) -> None:
        self._requests = requests
        self.source_ended = False

    def __iter__(self) -> Iterator[BatchRequest]:
        for request in self._requests:
            if request is None:
                return
            yield request
        self.source_ended = True


def batch_generator(parts: Parts) -> BatchGenerator:
    """Return what generates for many requests with the engine of `parts`."""
    engine = parts.engine  # first: it imports torch
    from ragkit.generation.batch_engine import BatchEngine

    return BatchEngine(engine, parts.config.batch)
