"""One question from end to end: retrieve, decide whether an answer is there, prompt, generate, cite.

Everything about the request lives here in locals; the pipeline's parts are shared and stay as they are. Timings run
from the arrival of the question, and loading models is taken out of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ragkit.answers.base import RankedChunk
from ragkit.answers.options import QueryOptions, require_text
from ragkit.answers.paged_steps import completed_from_pages, open_document
from ragkit.answers.steps import (
    REFUSAL,
    completed,
    generation_laps,
    ordered_timings,
    prepare,
    ranked,
    refused,
    sampling_of,
)
from ragkit.config import SearchMode, Strategy
from ragkit.drafting import drafting_for
from ragkit.errors import UsageError
from ragkit.reports import Hit, SearchResult
from ragkit.types import Answer, MetadataValue

if TYPE_CHECKING:
    from ragkit.documents import WholeDocument
    from ragkit.generation.steps import Finished
    from ragkit.parts import Parts
    from ragkit.retrieval.retriever import Retrieval, RetrievedChunk


class AnswerStream:
    """The pieces of one answer as they come; when they have ended, `answer` is all of it."""

    def __init__(self, pieces: Iterator[str | Answer]) -> None:
        self._pieces = pieces
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Answer):
            self._answer = piece
            raise StopIteration
        return piece

    @property
    def answer(self) -> Answer:
        """The whole answer; what has not been read yet is generated first."""
        for _ in self:
            pass
        assert self._answer is not None
        return self._answer

    def close(self) -> None:
        """Stop generating and give the request's memory back."""
        self._pieces.close()  # type: ignore[attr-defined]


class _Clock:
    """Milliseconds since the question arrived, without the time that went into loading models.

    Models are loaded by the thread that begins the request; who reads the last pieces in another has them by then.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._thread = threading.get_ident()
        self._started = time.perf_counter()
        self._loaded_before = parts.load_seconds()
        self._load_models = 0.0
        self.laps: dict[str, float] = {}

    @property
    def load_models(self) -> float:
        """Milliseconds that this request spent on loading models."""
        if threading.get_ident() == self._thread:
            self._load_models = 1e3 * (self._parts.load_seconds() - self._loaded_before)
        return self._load_models

    def elapsed(self) -> float:
        """Return milliseconds since the question arrived."""
        return 1e3 * (time.perf_counter() - self._started) - self.load_models

    def timings(self) -> dict[str, float]:
        """Return the timings of an answer that ends now."""
        return ordered_timings(self.laps, self.load_models, self.elapsed())


def search(
    parts: Parts,
    question: str,
    *,
    k: int | None,
    filter: Mapping[str, MetadataValue] | None,
    mode: SearchMode | str | None,
) -> SearchResult:
    """Return what `Pipeline.search` returns; arguments and errors are described there."""
    check_question(question)
    clock = _Clock(parts)
    found = parts.retriever.retrieve(question, k, dict(filter) if filter else None, mode)
    timings = {"load_models": clock.load_models, **found.timings_ms, "total": clock.elapsed()}
    return SearchResult(tuple(_hit(one) for one in found.chunks), timings)


def stream(parts: Parts, question: str, options: QueryOptions) -> AnswerStream:
    """Return what `Pipeline.stream` returns. The request starts with the first piece; its errors come here."""
    check_question(question)
    _ = parts.store
    return AnswerStream(_run(parts, question, options))


def _run(parts: Parts, question: str, options: QueryOptions) -> Iterator[str | Answer]:
    from ragkit.answers.confidence import judge

    clock = _Clock(parts)
    paged = paged_document(parts, options)
    if paged is not None:
        yield from _answered_from_pages(parts, question, paged, options, clock)
        return
    found = parts.retriever.retrieve(question, options.retrieval.k, options.retrieval_filters or None)
    hits = ranked(found.chunks)
    clock.laps["retrieve"] = clock.elapsed()
    _prefetch(parts, found, options)
    confidence = judge(question, hits, parts.embedder, options.answers)
    if not confidence.found:
        clock.laps["first_token"] = clock.elapsed()
        yield REFUSAL
        yield refused(options, clock.timings())
        return
    yield from _answered(parts, question, hits, options, clock)


def _prefetch(parts: Parts, found: Retrieval, options: QueryOptions) -> None:
    """Start to load the KV of what was retrieved, which then goes on while the question is judged."""
    if not parts.is_loaded("engine"):
        return  # its loading takes longer than that of any KV
    chunks = [one.stored.chunk for one in found.chunks]
    if options.chosen_strategy(sum(chunk.token_count for chunk in chunks)) is Strategy.BLEND:
        parts.blending.follow(found.generation)
        parts.blending.prefetch(chunks)


def _answered(
    parts: Parts, question: str, hits: tuple[RankedChunk, ...], options: QueryOptions, clock: _Clock
) -> Iterator[str | Answer]:
    engine = parts.engine  # first: it imports torch, which counts as loading
    from ragkit.generation.steps import GeneratedToken

    prepared = prepare(parts, question, hits, options)
    drafting = drafting_for(parts, prepared)
    before_engine = clock.elapsed()
    pieces: list[str] = []
    finished: Finished | None = None
    built, sampling = prepared.built, prepared.sampling
    for step in engine.generate(built.prompt, sampling, prepared.prefill, prepared.ratio, drafting):
        if isinstance(step, GeneratedToken):
            clock.laps.setdefault("first_token", clock.elapsed())
        else:
            finished = step
        if step.piece:
            pieces.append(step.piece)
            yield step.piece
    assert finished is not None, "a generation ends with Finished"
    clock.laps |= generation_laps(finished)
    clock.laps.setdefault("first_token", before_engine + finished.timings_ms["first_token"])
    yield completed(parts, prepared, "".join(pieces), finished, clock.timings)


def paged_document(parts: Parts, options: QueryOptions) -> WholeDocument | None:
    """Return the document that is answered from its pages, or None where chunks are retrieved.

    Raises:
        UsageError: pages were asked for, and not one document is named, or more than its name is given.
    """
    asked = options.generation.strategy
    if asked is Strategy.PAGES:
        if options.filters:
            names = ", ".join(options.filters)
            raise UsageError(f"an answer from pages reads one document whole, so it cannot be filtered by {names}")
        return parts.documents.find(options.document)
    if asked is not Strategy.AUTO or options.document is None or options.filters:
        return None
    found = parts.documents.find_single(options.document)
    if found is None:
        return None
    generation = options.generation
    window = min(generation.context_tokens or parts.engine.max_context, parts.engine.max_context)
    return None if found.num_tokens <= window - generation.max_new_tokens else found


def _answered_from_pages(
    parts: Parts, question: str, whole: WholeDocument, options: QueryOptions, clock: _Clock
) -> Iterator[str | Answer]:
    paging = parts.paging  # first: it imports torch, which counts as loading
    from ragkit.generation.steps import GeneratedToken

    with open_document(parts, whole, options) as (opened, was_read):
        if was_read:
            clock.laps["read_document"] = clock.elapsed()
        answer = paging.answer(opened, question, sampling_of(options), options.generation.system_prompt)
        before_engine = clock.elapsed()
        pieces: list[str] = []
        finished: Finished | None = None
        for step in answer.steps():
            if isinstance(step, GeneratedToken):
                clock.laps.setdefault("first_token", clock.elapsed())
            else:
                finished = step
            if step.piece:
                pieces.append(step.piece)
                yield step.piece
        attended = opened.attended(answer)
    assert finished is not None, "a generation ends with Finished"
    clock.laps["prefill"] = finished.timings_ms["prefill"]
    clock.laps.setdefault("first_token", before_engine + finished.timings_ms["first_token"])
    yield completed_from_pages(
        parts, question, whole, options, "".join(pieces), finished, attended, timings_ms=clock.timings
    )


def check_question(question: str) -> None:
    """Raise `UsageError` where a question has no characters, or some that no text has."""
    if not question.strip():
        raise UsageError("the question is empty: ask something")
    require_text("the question", question)


def _hit(found: RetrievedChunk) -> Hit:
    chunk = found.stored.chunk
    return Hit(
        rank=found.rank,
        score=found.score,
        uri=found.stored.uri,
        page=chunk.page,
        char_start=chunk.char_start,
        char_stop=chunk.char_stop,
        text=chunk.text,
        chunk_id=chunk.chunk_id,
        metadata=chunk.metadata,
    )
