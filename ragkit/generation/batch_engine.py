"""Answers many requests at once: as many run together as the KV pool holds, and what they have in common is shared.

`BatchEngine` looks ahead over the job and plans what prompts share (`prefix_groups`), a `BatchScheduler` says which
tokens each step computes, and a `BatchRunner` computes them. Answers are those of `Engine.generate`, one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from ragkit.config import BatchConfig, BatchOrder, ChunkPlacement
from ragkit.errors import GenerationError, RagkitError
from ragkit.generation.batch_drafts import BatchCosts
from ragkit.generation.batch_entries import RequestEntry, SharedEntry
from ragkit.generation.batch_job import BatchJob
from ragkit.generation.batch_request import BatchRequest, BatchResult
from ragkit.generation.batch_run import BatchRun
from ragkit.generation.batch_stats import BatchStats
from ragkit.generation.chunk_order import common_chunks_first
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.prefix_groups import PrefixPlan, plan_prefixes, unshared_plan
from ragkit.models.model_config import RopeType


class BatchEngine:
    """Generates for many requests at once with one engine. One run at a time; other threads may use the engine.

    Args:
        engine: the model and its pool, whose size bounds how many requests run together.
        config: how many at once, and what they share.

    Attributes:
        stats: what all runs so far counted.
    """

    def __init__(self, engine: Engine, config: BatchConfig | None = None) -> None:
        self.stats = BatchStats()
        self._engine = engine
        self._config = config or BatchConfig()

    def run(self, requests: Iterable[BatchRequest]) -> Iterator[BatchResult]:
        """Yield one result a request, as they end; what is wrong with a request is its result and stops no other.

        Requests are pulled `look_ahead` at a time, when none of those before waits any more. Closing the iterator gives
        all blocks back.
        """
        source = iter(requests)
        run = BatchRun(self._engine, self._config, self.stats)
        try:
            while True:
                coming = [] if run.num_waiting else list(islice(source, self._config.look_ahead))
                if not coming and not run.num_waiting and not run.num_running:
                    return
                if coming:
                    yield from self._counted(self._plan_ahead(coming, run))
                if run.num_waiting or run.num_running:
                    yield from self._counted(run.step())
        finally:
            run.close()

    def _counted(self, results: Iterable[BatchResult]) -> Iterator[BatchResult]:
        for result in results:
            self.stats.requests += 1
            self.stats.failed += result.error is not None
            yield result

    def _plan_ahead(self, requests: Sequence[BatchRequest], run: BatchRun) -> Iterator[BatchResult]:
        """Plan the next requests and let them wait; yield those that are wrong."""
        jobs: list[BatchJob] = []
        for request in requests:
            try:
                jobs.append(self._job(request))
            except RagkitError as error:
                yield BatchResult(request.request_id, "", error=error)
        plain = [job for job in jobs if job.strategy is None]
        if self._config.chunk_order is ChunkPlacement.FREE:
            for job, prompt in zip(plain, common_chunks_first([job.prompt for job in plain]), strict=True):
                job.prompt, job.token_ids = prompt, prompt.token_ids
        plan = self._plan(plain)
        ordered = [plain[index] for index in plan.order]
        in_order = self._config.order is BatchOrder.GIVEN
        planned = jobs if in_order else [*ordered, *(job for job in jobs if job.strategy is not None)]
        shared = _entries(plan)
        for job, at in zip(plain, plan.beginning, strict=True):
            if at is not None:
                job.shared_tokens = plan.shared[at].stop
                job.entry.beginning = shared[at]
                job.entry.prompt_tokens = len(job.token_ids) - job.shared_tokens
        sources = zip(shared, plan.shared, strict=True)
        yield from run.add(
            planned, {entry: plain[one.source].token_ids[one.start : one.stop] for entry, one in sources}
        )

    def _plan(self, jobs: list[BatchJob]) -> PrefixPlan:
        if not self._config.sharing:
            return unshared_plan(len(jobs))
        return plan_prefixes([job.token_ids for job in jobs], [job.sampling.max_new_tokens for job in jobs])

    def _job(self, request: BatchRequest) -> BatchJob:
        """Return the job of a request.

        Raises:
            GenerationError: the prompt is empty, fills the window or holds unknown tokens, or the strategy is unknown.
        """
        engine, config = self._engine, self._engine.decoder.config
        sampling = engine.within_window(request.prompt, request.sampling)
        token_ids = request.prompt.token_ids
        if not 0 <= min(token_ids) <= max(token_ids) < config.vocab_size:
            raise GenerationError(
                f"token ids must lie below {config.vocab_size}, got {min(token_ids)} to {max(token_ids)}"
            )
        if config.rope.rope_type is RopeType.DYNAMIC and len(token_ids) > config.rope.max_position:
            raise GenerationError(
                f"a prompt of {len(token_ids)} tokens, beyond the {config.rope.max_position} of this model's rotary "
                "frequencies, has frequencies of its own, which a batch does not share: ask it alone"
            )
        strategy = engine.strategy(request.strategy) if isinstance(request.strategy, str) else request.strategy
        stops = frozenset(config.stop_token_ids) | frozenset(sampling.stop_token_ids)
        stops = frozenset() if sampling.ignore_stop_tokens else stops
        drafted = None
        if request.drafting is not None:
            costs = BatchCosts(engine.draft_costs)
            drafted = engine.speculative_request(request.drafting, request.prompt, sampling, stops, costs)
        return BatchJob(
            request,
            request.prompt,
            sampling,
            stops,
            None if isinstance(strategy, FullPrefill) else strategy,
            token_ids,
            RequestEntry(0, len(token_ids), sampling.max_new_tokens),
            answer=[] if drafted is None else drafted.token_ids,
            drafted=drafted,
        )


def _entries(plan: PrefixPlan) -> list[SharedEntry]:
    """Return what the scheduler knows of each shared stretch."""
    entries: list[SharedEntry] = []
    for key, one in enumerate(plan.shared):
        parent = None if one.parent is None else entries[one.parent]
        entries.append(SharedEntry(key, one.stop - one.start, parent))
    return entries
