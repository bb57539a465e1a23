"""One question from end to end: retrieve, decide whether an answer is there, prompt, generate, cite.

Everything about the request lives here in locals; the pipeline's parts are shared and stay as they are. Timings run
from the arrival of the question, and loading models is taken out of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from ragkit.answers.base import Confidence, RankedChunk
from ragkit.config import AnswerConfig, BlendConfig, GenerationConfig, RetrievalConfig, SearchMode, Strategy
from ragkit.errors import UsageError
from ragkit.progress import Progress, Silent
from ragkit.reports import Hit, SearchResult
from ragkit.types import Answer, AttendedSpan, Citation, KVUse, MetadataValue, Prompt, TokenUsage, page_of

if TYPE_CHECKING:
    from ragkit.documents import WholeDocument
    from ragkit.generation.steps import Finished
    from ragkit.parts import Parts
    from ragkit.retrieval.retriever import Retrieval, RetrievedChunk

# What prefill consists of, as blending reports it; `load_kv` stands in every answer.
_BLEND_STEPS = ("compute_kv", "select", "blend")

REFUSAL = "The collection does not seem to hold an answer to this question."


@dataclass(frozen=True, slots=True)
class QueryOptions:
    """The configuration of one question, after the caller's changes.

    `filters` restrict the documents, `document` is the URI of the only one that is meant, and `progress` hears of what
    takes long before the answer.
    """

    generation: GenerationConfig
    blend: BlendConfig
    retrieval: RetrievalConfig
    answers: AnswerConfig
    filters: Mapping[str, MetadataValue] = field(default_factory=dict)
    document: str | None = None
    progress: Progress = field(default_factory=Silent)

    @property
    def retrieval_filters(self) -> dict[str, MetadataValue]:
        """What restricts retrieval: the filters and the document."""
        return {**self.filters, **({} if self.document is None else {"uri": self.document})}


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
    """Milliseconds since the question arrived, without the time that went into loading models."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._started = time.perf_counter()
        self._loaded_before = parts.load_seconds()
        self.laps: dict[str, float] = {}

    @property
    def load_models(self) -> float:
        """Milliseconds that this request spent on loading models."""
        return 1e3 * (self._parts.load_seconds() - self._loaded_before)

    def elapsed(self) -> float:
        """Return milliseconds since the question arrived."""
        return 1e3 * (time.perf_counter() - self._started) - self.load_models


def search(
    parts: Parts,
    question: str,
    *,
    k: int | None,
    filter: Mapping[str, MetadataValue] | None,
    mode: SearchMode | str | None,
) -> SearchResult:
    """Return what `Pipeline.search` returns; arguments and errors are described there."""
    _check_question(question)
    clock = _Clock(parts)
    found = parts.retriever.retrieve(question, k, dict(filter) if filter else None, mode)
    timings = {"load_models": clock.load_models, **found.timings_ms, "total": clock.elapsed()}
    return SearchResult(tuple(_hit(one) for one in found.chunks), timings)


def stream(parts: Parts, question: str, options: QueryOptions) -> AnswerStream:
    """Return what `Pipeline.stream` returns. The request starts with the first piece; its errors come here."""
    _check_question(question)
    _ = parts.store
    return AnswerStream(_run(parts, question, options))


def _run(parts: Parts, question: str, options: QueryOptions) -> Iterator[str | Answer]:
    from ragkit.answers.confidence import judge

    clock = _Clock(parts)
    paged = _paged_document(parts, options)
    if paged is not None:
        yield from _answered_from_pages(parts, question, paged, options, clock)
        return
    found = parts.retriever.retrieve(question, options.retrieval.k, options.retrieval_filters or None)
    hits = tuple(_ranked(one) for one in found.chunks)
    clock.laps["retrieve"] = clock.elapsed()
    _prefetch(parts, found, options)
    confidence = judge(question, hits, parts.embedder, options.answers)
    if not confidence.found:
        clock.laps["first_token"] = clock.elapsed()
        yield REFUSAL
        yield _refused(parts, options, clock)
        return
    yield from _answered(parts, question, hits, confidence, options, clock)


def _prefetch(parts: Parts, found: Retrieval, options: QueryOptions) -> None:
    """Start to load the KV of what was retrieved, which then goes on while the question is judged."""
    if not parts.is_loaded("engine"):
        return  # its loading takes longer than that of any KV
    chunks = [one.stored.chunk for one in found.chunks]
    if _chosen(options, sum(chunk.token_count for chunk in chunks)) is Strategy.BLEND:
        parts.blending.follow(found.generation)
        parts.blending.prefetch(chunks)


def _chosen(options: QueryOptions, chunk_tokens: int) -> Strategy:
    """Return the strategy for a prompt with so many tokens of chunks.

    What is stored plays no part: a question gets the same answer from a cold cache as from a warm one.
    """
    asked = options.generation.strategy
    if chunk_tokens == 0 or (asked is Strategy.AUTO and chunk_tokens < options.blend.min_tokens):
        return Strategy.FULL
    return Strategy.BLEND if asked is Strategy.AUTO else asked


def _chunk_tokens(prompt: Prompt) -> int:
    return sum(len(segment.token_ids) for segment in prompt.segments if segment.chunk_id is not None)


def _answered(
    parts: Parts,
    question: str,
    hits: tuple[RankedChunk, ...],
    confidence: Confidence,
    options: QueryOptions,
    clock: _Clock,
) -> Iterator[str | Answer]:
    engine = parts.engine  # first: it imports torch, which counts as loading
    from ragkit.answers.citations import cite
    from ragkit.generation.sampling import SamplingConfig
    from ragkit.generation.steps import GeneratedToken
    from ragkit.kvcache.coverage import configured_ratio

    generation = options.generation
    built = engine.prompt_builder(generation.system_prompt).build(
        question,
        [hit.chunk for hit in hits],
        max_new_tokens=generation.max_new_tokens,
        context_tokens=generation.context_tokens,
    )
    sampling = SamplingConfig(generation.max_new_tokens, generation.temperature, generation.top_p, generation.seed)
    strategy = _chosen(options, _chunk_tokens(built.prompt))
    prefill = parts.blending.prefill if strategy is Strategy.BLEND else strategy.value
    before_engine = clock.elapsed()
    pieces: list[str] = []
    finished: Finished | None = None
    for step in engine.generate(built.prompt, sampling, prefill, configured_ratio(options.blend)):
        if isinstance(step, GeneratedToken):
            clock.laps.setdefault("first_token", clock.elapsed())
        else:
            finished = step
        if step.piece:
            pieces.append(step.piece)
            yield step.piece
    assert finished is not None, "a generation ends with Finished"
    steps = ("load_kv", *_BLEND_STEPS, "prefill")
    clock.laps |= {name: finished.timings_ms[name] for name in steps if name in finished.timings_ms}
    clock.laps.setdefault("first_token", before_engine + finished.timings_ms["first_token"])
    text = "".join(pieces).strip()
    citations = cite(question, text, hits, parts.embedder, options.answers, _page_lookup(parts))
    dropped = set(built.dropped_chunks)
    cut = (f"{len(dropped)} of {len(hits)} chunks did not fit into the model's window",) if dropped else ()
    yield _answer(
        parts,
        options,
        clock,
        text=text,
        found=confidence.found,
        citations=citations,
        strategy=strategy,
        tokens=finished.usage,
        kv=finished.kv,
        dropped_chunks=built.dropped_chunks,
        warnings=(*cut, *finished.warnings),
    )


def _paged_document(parts: Parts, options: QueryOptions) -> WholeDocument | None:
    """Return the document that is answered from its pages, or None where chunks are retrieved.

    Raises:
        UsageError: pages were asked for, and not one document is named, or more than its name is given.
    """
    from ragkit.documents import find_document, find_single

    asked = options.generation.strategy
    if asked is Strategy.PAGES:
        if options.filters:
            names = ", ".join(options.filters)
            raise UsageError(f"an answer from pages reads one document whole, so it cannot be filtered by {names}")
        return find_document(parts.store, options.document)
    if asked is not Strategy.AUTO or options.document is None or options.filters:
        return None
    found = find_single(parts.store, options.document)
    if found is None:
        return None
    generation = options.generation
    window = min(generation.context_tokens or parts.engine.max_context, parts.engine.max_context)
    return None if found.num_tokens <= window - generation.max_new_tokens else found


def _answered_from_pages(
    parts: Parts, question: str, whole: WholeDocument, options: QueryOptions, clock: _Clock
) -> Iterator[str | Answer]:
    paging = parts.paging  # first: it imports torch, which counts as loading
    from ragkit.answers.citations import cite
    from ragkit.documents import chunks_attended
    from ragkit.generation.paging import PagedText, price_line
    from ragkit.generation.sampling import SamplingConfig
    from ragkit.generation.steps import GeneratedToken

    generation = options.generation
    sampling = SamplingConfig(generation.max_new_tokens, generation.temperature, generation.top_p, generation.seed)
    document = whole.document
    text = PagedText(document.doc_id, document.text, whole.chunks[0].chunk_id)
    with paging.document(text, generation.system_prompt) as opened:
        if not opened.pages.is_complete:
            options.progress.message(price_line(whole.uri, paging.price(opened)))
            try:
                paging.read(opened, options.progress)
            finally:
                options.progress.close()
            clock.laps["read_document"] = clock.elapsed()
        answer = paging.answer(opened, question, sampling, generation.system_prompt)
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
    words = "".join(pieces).strip()
    hits = tuple(
        RankedChunk(chunk, whole.uri, score, None, None, rank)
        for rank, (chunk, score) in enumerate(chunks_attended(whole, attended, options.retrieval.k), start=1)
    )
    yield _answer(
        parts,
        options,
        clock,
        text=words,
        found=True,
        citations=cite(question, words, hits, parts.embedder, options.answers, _page_lookup(parts)),
        strategy=Strategy.PAGES,
        tokens=finished.usage,
        kv=finished.kv,
        attended=attended,
    )


def _page_lookup(parts: Parts) -> Callable[[str, int], int | None]:
    """Return the page of a character: a quote may stand on a later page than the start of its chunk."""
    pages = cache(parts.store.pages)
    return lambda doc_id, char: page_of(pages(doc_id), char)


def _refused(parts: Parts, options: QueryOptions, clock: _Clock) -> Answer:
    # Nothing was prefilled; what is reported is what was asked for.
    asked = options.generation.strategy
    strategy = Strategy.FULL if asked is Strategy.AUTO else asked
    return _answer(
        parts, options, clock, text=REFUSAL, found=False, citations=(), strategy=strategy, tokens=TokenUsage()
    )


def _answer(
    parts: Parts,
    options: QueryOptions,
    clock: _Clock,
    *,
    text: str,
    found: bool,
    citations: tuple[Citation, ...],
    strategy: Strategy,
    tokens: TokenUsage,
    kv: KVUse | None = None,
    dropped_chunks: tuple[str, ...] = (),
    warnings: tuple[str, ...] = (),
    attended: tuple[AttendedSpan, ...] = (),
) -> Answer:
    laps = {"load_kv": 0.0, "prefill": 0.0} | clock.laps
    names = ("retrieve", "read_document", "load_kv", *_BLEND_STEPS, "prefill", "first_token")
    timings = {"load_models": clock.load_models} | {name: laps[name] for name in names if name in laps}
    return Answer(
        text=text,
        found=found,
        citations=citations,
        strategy=strategy.value,
        model=options.generation.model,
        tokens=tokens,
        timings_ms=timings | {"total": clock.elapsed()},
        dropped_chunks=dropped_chunks,
        warnings=warnings,
        kv=kv or KVUse(),
        attended=attended,
    )


def _check_question(question: str) -> None:
    if not question.strip():
        raise UsageError("the question is empty: ask something")


def _ranked(found: RetrievedChunk) -> RankedChunk:
    return RankedChunk(found.stored.chunk, found.stored.uri, found.score, found.dense, found.bm25, found.rank)


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
