"""The steps of an answer around generation, the same for one question and for a batch: prompt, citations, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ragkit.answers.base import RankedChunk
from ragkit.answers.options import QueryOptions
from ragkit.config import Strategy
from ragkit.errors import StoreCorruptError, StoreError
from ragkit.types import Answer, AttendedSpan, Citation, DraftUse, KVUse, TokenUsage, page_of

if TYPE_CHECKING:
    from ragkit.generation.prompt import BuiltPrompt
    from ragkit.generation.sampling import SamplingConfig
    from ragkit.generation.steps import Finished
    from ragkit.generation.strategy import PrefillStrategy
    from ragkit.kvcache.coverage import Ratio
    from ragkit.parts import Parts
    from ragkit.retrieval.retriever import RetrievedChunk

REFUSAL = "The collection does not seem to hold an answer to this question."

# What prefill consists of, as blending reports it; `load_kv` stands in every answer.
_BLEND_STEPS = ("compute_kv", "select", "blend")
_LAPS = ("retrieve", "read_document", "load_kv", *_BLEND_STEPS, "prefill", "first_token")


@dataclass(frozen=True, slots=True)
class PreparedQuestion:
    """A question that is ready to be generated from.

    Attributes:
        question: what is asked.
        hits: the retrieved chunks, best first.
        options: the question's configuration.
        built: the prompt, and which chunks did not fit.
        strategy: how the prompt is prefilled: full or blend.
        prefill: the same, as the engine takes it.
        sampling: how tokens are chosen.
        ratio: what blending computes anew.
    """

    question: str
    hits: tuple[RankedChunk, ...]
    options: QueryOptions
    built: BuiltPrompt
    strategy: Strategy
    prefill: str | PrefillStrategy
    sampling: SamplingConfig
    ratio: Ratio


def ranked(chunks: Sequence[RetrievedChunk]) -> tuple[RankedChunk, ...]:
    """Return what was retrieved as answers take it."""
    return tuple(
        RankedChunk(one.stored.chunk, one.stored.uri, one.score, one.dense, one.bm25, one.rank) for one in chunks
    )


def prepare(parts: Parts, question: str, hits: tuple[RankedChunk, ...], options: QueryOptions) -> PreparedQuestion:
    """Return the prompt of a question over its chunks, and how it is to be generated from.

    Raises:
        GenerationError: the question alone does not fit into the window.
    """
    engine = parts.engine  # first: it imports torch, which counts as loading
    from ragkit.kvcache.coverage import configured_ratio

    generation = options.generation
    built = engine.prompt_builder(generation.system_prompt).build(
        question,
        [hit.chunk for hit in hits],
        max_new_tokens=generation.max_new_tokens,
        context_tokens=generation.context_tokens,
    )
    chunk_tokens = sum(len(segment.token_ids) for segment in built.prompt.segments if segment.chunk_id is not None)
    strategy = options.chosen_strategy(chunk_tokens)
    prefill = parts.blending.prefill if strategy is Strategy.BLEND else strategy.value
    ratio = configured_ratio(options.blend)
    return PreparedQuestion(question, hits, options, built, strategy, prefill, sampling_of(options), ratio)


def sampling_of(options: QueryOptions) -> SamplingConfig:
    """Return how the tokens of an answer are chosen."""
    from ragkit.generation.sampling import SamplingConfig

    generation = options.generation
    return SamplingConfig(generation.max_new_tokens, generation.temperature, generation.top_p, generation.seed)


def completed(
    parts: Parts,
    prepared: PreparedQuestion,
    text: str,
    finished: Finished,
    timings_ms: Callable[[], Mapping[str, float]],
) -> Answer:
    """Return the answer made of the generated `text`, with its citations; `timings_ms` is asked when they are there."""
    from ragkit.answers.citations import cite

    text = text.strip()
    options, hits = prepared.options, prepared.hits
    citations = cite(prepared.question, text, hits, parts.embedder, options.answers, page_lookup(parts, hits))
    dropped = prepared.built.dropped_chunks
    cut = (f"{len(set(dropped))} of {len(hits)} chunks did not fit into the model's window",) if dropped else ()
    return answer_of(
        options,
        timings_ms(),
        text=text,
        citations=citations,
        strategy=prepared.strategy,
        tokens=finished.usage,
        kv=finished.kv,
        dropped_chunks=dropped,
        warnings=(*cut, *options.ratio_warnings(prepared.strategy), *finished.warnings),
        draft=finished.draft,
    )


def refused(options: QueryOptions, timings_ms: Mapping[str, float]) -> Answer:
    """Return the answer to a question that nothing supports an answer to."""
    # Nothing was prefilled; what is reported is what was asked for.
    asked = options.generation.strategy
    strategy = Strategy.FULL if asked is Strategy.AUTO else asked
    return answer_of(
        options, timings_ms, text=REFUSAL, found=False, citations=(), strategy=strategy, tokens=TokenUsage()
    )


def answer_of(
    options: QueryOptions,
    timings_ms: Mapping[str, float],
    *,
    text: str,
    found: bool = True,
    citations: tuple[Citation, ...],
    strategy: Strategy,
    tokens: TokenUsage,
    kv: KVUse | None = None,
    dropped_chunks: tuple[str, ...] = (),
    warnings: tuple[str, ...] = (),
    attended: tuple[AttendedSpan, ...] = (),
    draft: DraftUse | None = None,
) -> Answer:
    """Return the answer to a question with these options."""
    return Answer(
        text=text,
        found=found,
        citations=citations,
        strategy=strategy.value,
        model=options.generation.model,
        tokens=tokens,
        timings_ms=timings_ms,
        dropped_chunks=dropped_chunks,
        warnings=warnings,
        kv=kv or KVUse(),
        attended=attended,
        draft=draft or DraftUse(),
    )


def generation_laps(finished: Finished) -> dict[str, float]:
    """Return what prefill consisted of, in milliseconds."""
    steps = ("load_kv", *_BLEND_STEPS, "prefill")
    return {name: finished.timings_ms[name] for name in steps if name in finished.timings_ms}


def ordered_timings(laps: Mapping[str, float], load_models: float, total: float) -> dict[str, float]:
    """Return the timings of an answer in their order; loading and prefill stand there even where nothing was done."""
    known = {"load_kv": 0.0, "prefill": 0.0, **laps}
    return {"load_models": load_models, **{name: known[name] for name in _LAPS if name in known}, "total": total}


def page_lookup(parts: Parts, hits: Sequence[RankedChunk]) -> Callable[[str, int], int | None]:
    """Return the page of a character: a quote may stand on a later page than the start of its chunk.

    Of a document that was removed since it was found, only the pages on which its chunks start are known.
    """
    pages = cache(parts.store.pages)

    def page(doc_id: str, char: int) -> int | None:
        try:
            return page_of(pages(doc_id), char)
        except StoreCorruptError:
            raise
        except StoreError:
            starts = [hit.chunk for hit in hits if hit.chunk.doc_id == doc_id and hit.chunk.char_start <= char]
            return max(starts, key=lambda chunk: chunk.char_start).page if starts else None

    return page
