"""What a batch would take, from a sample of its rows: time, tokens and bytes of KV. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ragkit.answers.steps import PreparedQuestion, prepare
from ragkit.config import Strategy
from ragkit.errors import RagkitError
from ragkit.jobs.answer_rows import output_kind
from ragkit.jobs.answering import BatchGenerator, batch_generator
from ragkit.jobs.batch import BatchJob
from ragkit.jobs.kv_status import estimated_bytes
from ragkit.jobs.retrieved_rows import FoundRow, PagedRow, RowRetrieval
from ragkit.jobs.rows import QuestionRow, RowOutcome
from ragkit.jobs.spooled_rows import SpooledRows

if TYPE_CHECKING:
    from ragkit.parts import Parts

SAMPLED_ROWS = 32  # retrieved, to count the tokens of their prompts
MEASURED_ROWS = 3  # generated from, to measure the generator
_MEASURED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class BatchEstimate:
    """What a batch would take. Tokens, seconds and bytes are at most that much, as far as the sample tells.

    Attributes:
        rows, bad_rows: rows of the job, and those of them that cannot be asked.
        sampled_rows: rows whose chunks were retrieved for this.
        prompt_tokens, answer_tokens: of all rows; answers end earlier where the model ends them.
        retrieve_ms: a row, measured.
        prefill_tokens_per_second, decode_tokens_per_second: measured on a few rows, with nothing reused.
        seconds: of all rows. Sharing, reuse and fuller batches make it less.
        row_kv_bytes: KV that the longest sampled row holds while it is answered.
        stored_kv_bytes: chunk KV that is computed and kept where rows are blended; 0 where none is.
        paged_rows: rows among the sample that read a document whole, which are not in the other figures.
        warnings: one line each.
    """

    rows: int
    bad_rows: int
    sampled_rows: int
    prompt_tokens: int
    answer_tokens: int
    retrieve_ms: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    seconds: float
    row_kv_bytes: int
    stored_kv_bytes: int
    paged_rows: int = 0
    warnings: tuple[str, ...] = ()


def estimate_batch(parts: Parts, job: BatchJob, generator: BatchGenerator | None = None) -> BatchEstimate:
    """Return what `job` would take, measured on a few of its rows.

    Raises:
        UsageError: the job could not be begun either.
    """
    job.check(parts)
    with job.rows(output_kind(job.out)) as rows:
        bad = sum(row.error is not None for row in rows)
        sample = list(_spread(rows, rows.count, SAMPLED_ROWS))
        outcomes, retrieve_ms = _retrieved(parts, sample)
        prepared = list(_prepared(parts, outcomes))
        speed = _Speed.of(generator or batch_generator(parts), prepared[:: max(1, len(prepared) // MEASURED_ROWS)])
        scale = (rows.count - bad) / max(1, sum(row.error is None for row in sample))
        prompts = [len(one.built.prompt) for one in prepared]
        answers = [one.sampling.max_new_tokens for one in prepared]
        seconds = scale * sum(map(speed.seconds, prompts, answers)) + (rows.count - bad) * retrieve_ms / 1e3
        token_bytes = parts.engine.decoder.layout.bytes_per_token
        return BatchEstimate(
            rows=rows.count,
            bad_rows=bad,
            sampled_rows=len(sample),
            prompt_tokens=round(scale * sum(prompts)),
            answer_tokens=round(scale * sum(answers)),
            retrieve_ms=retrieve_ms,
            prefill_tokens_per_second=speed.prefill,
            decode_tokens_per_second=speed.decode,
            seconds=seconds,
            row_kv_bytes=token_bytes * max((sum(pair) for pair in zip(prompts, answers, strict=True)), default=0),
            stored_kv_bytes=_stored_kv_bytes(parts, prepared, scale),
            paged_rows=sum(isinstance(one, PagedRow) for one in outcomes),
            warnings=tuple(rows.warnings),
        )


@dataclass(frozen=True, slots=True)
class _Speed:
    """Tokens a second, 0 where nothing could be measured."""

    prefill: float = 0.0
    decode: float = 0.0

    @classmethod
    def of(cls, generator: BatchGenerator, prepared: Sequence[PreparedQuestion]) -> _Speed:
        """Generate from these prompts with full prefill: some tokens each, then one, the difference is decoding.

        The longer run comes first: what is done but once, such as compiling products, makes decoding look slower then,
        and never prefill look slower than both.
        """
        some = prepared[:MEASURED_ROWS]
        if not some:
            return cls()
        more = _generated(generator, some, 1 + _MEASURED_TOKENS)
        first = _generated(generator, some, 1)
        decoding = more - first if more > first else more  # a busy machine: at most all of it was decoding
        prompt_tokens = sum(len(one.built.prompt) for one in some)
        return cls(prompt_tokens / first, len(some) * _MEASURED_TOKENS / decoding)

    def seconds(self, prompt_tokens: int, answer_tokens: int) -> float:
        return prompt_tokens / self.prefill + answer_tokens / self.decode if self.prefill else 0.0


def _generated(generator: BatchGenerator, prepared: Sequence[PreparedQuestion], tokens: int) -> float:
    """Return the seconds that it takes to generate so many tokens behind each of these prompts."""
    from ragkit.generation.batch_request import BatchRequest

    requests = [
        BatchRequest(
            str(number),
            one.built.prompt,
            replace(one.sampling, max_new_tokens=tokens, ignore_stop_tokens=True),
            Strategy.FULL.value,
        )
        for number, one in enumerate(prepared)
    ]
    started = time.perf_counter()
    for result in generator.run(requests):
        if result.error is not None:
            raise result.error
    return time.perf_counter() - started


def _spread(rows: SpooledRows, count: int, wanted: int) -> Iterator[QuestionRow]:
    step = max(1, count // wanted)
    return (row for row in rows if row.number % step == 0 and row.number // step < wanted)


def _retrieved(parts: Parts, sample: list[QuestionRow]) -> tuple[list[FoundRow | PagedRow | RowOutcome], float]:
    """Return what became of the sampled rows, and the milliseconds that one took."""
    _ = parts.engine
    with RowRetrieval(parts) as retrieval:
        list(retrieval.run(iter(sample[:1])))  # loads what is loaded on first use
        started = time.perf_counter()
        outcomes = list(retrieval.run(iter(sample)))
    return outcomes, 1e3 * (time.perf_counter() - started) / len(sample)


def _prepared(parts: Parts, outcomes: Sequence[FoundRow | PagedRow | RowOutcome]) -> Iterator[PreparedQuestion]:
    for outcome in outcomes:
        if isinstance(outcome, FoundRow):
            try:
                yield prepare(parts, outcome.row.question, outcome.hits, outcome.options)
            except RagkitError:
                continue  # the row's own error, when it comes to it


def _stored_kv_bytes(parts: Parts, prepared: Sequence[PreparedQuestion], scale: float) -> int:
    """Return about how much chunk KV the blended rows make, at most that of all chunks."""
    blended = [one for one in prepared if one.strategy is Strategy.BLEND]
    chunks = {hit.chunk.chunk_id for one in blended for hit in one.hits}
    counts = parts.store.counts()
    whole = estimated_bytes(counts, parts.config)
    return 0 if whole is None or not counts.chunks else round(whole * min(1.0, scale * len(chunks) / counts.chunks))
