"""One run of a batch: carries out what the scheduler decides, chooses tokens, and ends answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ragkit.config import BatchConfig
from ragkit.errors import CacheCapacityError, RagkitError
from ragkit.generation.batch_drafts import BatchDrafts, likeliest_tokens
from ragkit.generation.batch_entries import Entry, RequestEntry, SharedEntry, beginnings
from ragkit.generation.batch_failures import failed, out_of_patience, refused
from ragkit.generation.batch_job import BatchJob
from ragkit.generation.batch_prefetch import REQUESTS_AHEAD, BatchPrefetch
from ragkit.generation.batch_request import BatchResult
from ragkit.generation.batch_runner import BatchRunner
from ragkit.generation.batch_scheduler import BatchScheduler
from ragkit.generation.batch_stats import BatchStats
from ragkit.generation.batch_step import BatchStep, Piece
from ragkit.generation.contiguous_verify import ContiguousVerifier
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.engine import Engine
from ragkit.generation.packed_pass import PackedPiece, PackedRequest
from ragkit.generation.pool_supply import PoolSupply
from ragkit.generation.steps import FinishReason
from ragkit.generation.strategy import LaunchedPrefill, PrefillRequest, PrefillResult, launch
from ragkit.kvcache.request_kv import RequestKV


class BatchRun:
    """One run of a batch engine.

    Args:
        engine: the model.
        config: how many at once.
        stats: what is counted.
    """

    def __init__(self, engine: Engine, config: BatchConfig, stats: BatchStats) -> None:
        self._engine = engine
        self._stats = stats
        self._rotary = engine.rotary.table(engine.max_context, 0)
        # The paged runner attends to the pool's blocks; without it, requests decode over copies of their own.
        is_paged = isinstance(engine.step_runner, DecodeRunner)
        verifier = engine.verifier if is_paged else ContiguousVerifier(engine.decoder, writes_pool=False)
        steps = engine.step_runner
        self._runner = BatchRunner(engine.decoder, engine.pool, self._rotary, steps, verifier, is_paged=is_paged)
        self._drafts = BatchDrafts(engine, self._runner, stats)
        self._prefetch = BatchPrefetch()
        self._jobs: dict[RequestEntry, BatchJob] = {}
        self._shared: dict[SharedEntry, tuple[int, ...]] = {}  # tokens
        self._packed: dict[SharedEntry, PackedRequest] = {}
        self._begun: set[Entry] = set()
        self._gave_up: list[BatchResult] = []  # of requests that found the pool taken too often
        self._launched: list[tuple[BatchJob, LaunchedPrefill]] = []  # by strategies, in this step
        self._recomputed: dict[str, float] = {}  # part of the prompt that a strategy computed last
        self._supply = supply = PoolSupply(engine, self._release, self._give_back)
        self._scheduler = BatchScheduler(supply, config.token_budget, config.max_running)

    @property
    def num_waiting(self) -> int:
        """Requests that do not run yet."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that run."""
        return self._scheduler.num_running

    def add(
        self, jobs: Sequence[BatchJob], shared: Mapping[SharedEntry, tuple[int, ...]]
    ) -> Iterator[BatchResult]:  # fmt: skip
        """Let `jobs` wait in this order; yield those that the pool can never hold.

        Args:
            jobs: what is to run.
            shared: the tokens of the common beginnings that they list.
        """
        self._forget_shared()
        self._shared.update(shared)
        for job in jobs:
            if job.strategy is not None:
                self._price(job)
            try:
                self._add(job)
            except CacheCapacityError as error:
                yield BatchResult(job.request.request_id, "", error=error)

    @torch.inference_mode()
    def step(self) -> list[BatchResult]:
        """Run one step; return what ended in it."""
        deciding = [self._jobs[entry] for entry in self._scheduler.decoding]
        self._drafts.wish(deciding, may_begin=self._scheduler.is_full)
        step = self._scheduler.step()
        starting, coming = step.by_strategy, self._scheduler.coming(REQUESTS_AHEAD)
        self._prefetch.look([self._jobs[entry] for entry in starting], [self._jobs[entry] for entry in coming])
        results = [refused(self._jobs.pop(entry), self._engine.pool) for entry in step.refused]
        self._open(step)
        self._count(step)
        decodes = [self._jobs[entry] for entry in step.decodes if self._reserve(self._jobs[entry], step)]
        # A GPU computes the pass while the host prepares what strategies launch; the tokens are taken after both.
        is_ahead = bool(step.by_strategy) and bool(decodes or step.pieces) and not any(job.drafted for job in decodes)
        rows = self._rows(decodes, step) if is_ahead else None
        try:
            for entry in step.by_strategy:
                results += self._launch(self._jobs[entry])
            if step.started or step.by_strategy:
                self._count_bytes()
            self._supply.settle()
            if not is_ahead:  # what drafted passes take is measured, without waiting for prefills
                results += self._first_tokens()
            if decodes or step.pieces:
                results += self._compute(decodes, step, rows)
            results += self._first_tokens()
        finally:
            self._let_go()
        results += self._gave_up
        self._gave_up = []
        self._stats.steps += 1
        self._stats.preemptions += self._scheduler.preemptions
        self._stats.prefill_tokens_repeated += self._scheduler.repeated_tokens
        self._scheduler.preemptions = self._scheduler.repeated_tokens = 0
        return results

    def _rows(self, decodes: Sequence[BatchJob], step: BatchStep) -> Tensor:
        """Return the logits of the step's pass, for which a GPU need not be waited."""
        requests, last = [job.rows for job in decodes], [job.answer[-1] for job in decodes]
        return self._runner.step(requests, last, [self._packed_piece(piece) for piece in step.pieces])

    def _compute(self, decodes: Sequence[BatchJob], step: BatchStep, rows: Tensor | None) -> list[BatchResult]:
        """Run the step's pass, unless `rows` are its logits, and take what it brings; return what ended."""
        pieces = step.pieces
        granted = {self._jobs[entry]: rows for entry, rows in step.drafts.items() if entry in self._jobs}
        trees = self._drafts.trees(decodes, granted) if granted else [DraftTree()] * len(decodes)
        is_drafted = any(len(tree) for tree in trees)
        before = [job.rows.kv.num_tokens for job in decodes]
        started = time.perf_counter()
        if is_drafted:
            self._stats.verify_steps += 1
            requests, last = [job.rows for job in decodes], [job.answer[-1] for job in decodes]
            logits = self._runner.verify(requests, last, trees)
            likeliest = likeliest_tokens(logits)
        else:
            rows = self._rows(decodes, step) if rows is None else rows
            logits = list(rows.unsqueeze(1))
            likeliest = rows.argmax(dim=-1).unsqueeze(1).tolist()  # the host waits once for all of them
        self._stats.mixed_steps += bool(decodes and pieces)
        self._stats.decode_tokens += len(decodes)
        self._stats.prefill_tokens_computed += sum(piece.stop - piece.start for piece in pieces)
        verifier = self._runner.verifier if is_drafted else None
        first = [self._jobs[one.entry] for one in pieces if one.is_last and isinstance(one.entry, RequestEntry)]
        jobs = [*decodes, *first]
        reasons = [
            job.take(rows, tokens, tree, verifier)
            for job, rows, tokens, tree in zip(jobs, logits, likeliest, [*trees, *[None] * len(first)], strict=True)
        ]
        if any(job.drafted is not None for job in decodes):
            pass_ms = (time.perf_counter() - started) * 1e3
            self._drafts.observe(decodes, trees, before, pass_ms)
            if not pieces:
                self._drafts.note_cost(trees, before, pass_ms)
        return [result for job, reason in zip(jobs, reasons, strict=True) for result in self._taken(job, reason)]

    def close(self) -> None:
        """Give all rows back."""
        with contextlib.closing(self._prefetch), contextlib.closing(self._supply):
            self._scheduler.close()

    def _forget_shared(self) -> None:
        """Let go of common beginnings that no request lists any more: a job may have any number of them."""
        used = {one for entry in self._jobs for one in beginnings(entry)} | self._packed.keys()
        self._shared = {one: tokens for one, tokens in self._shared.items() if one in used}
        self._begun &= used | self._jobs.keys()

    def _add(self, job: BatchJob) -> None:
        try:
            self._scheduler.add(job.entry)
        except CacheCapacityError:
            if job.entry.beginning is None:
                raise
            # Rows that are shared fill their last block only in part: alone it may fit.
            job.entry.beginning, job.shared_tokens = None, 0
            job.entry.prompt_tokens = len(job.token_ids)
            self._scheduler.add(job.entry)
        self._jobs[job.entry] = job

    def _price(self, job: BatchJob) -> None:
        """Say what a strategy's prefill takes: tokens as it computed last, blocks as if no row were shared."""
        assert job.strategy is not None
        pool, size = self._engine.pool, len(job.token_ids)
        job.entry.cost = max(1, round(size * self._recomputed.get(job.strategy.name, 1.0)))
        blocks = pool.blocks_for(size + job.sampling.max_new_tokens) + len(job.prompt.segments)
        job.entry.strategy_blocks = min(blocks, self._supply.capacity)

    def _open(self, step: BatchStep) -> None:
        """Give what starts its rows; what finds the pool taken by somebody else waits again."""
        failed: set[Entry] = set()
        for entry in step.started:
            above = entry.parent if isinstance(entry, SharedEntry) else entry.beginning
            try:
                if above in failed:
                    raise CacheCapacityError("what it begins with found no room")
                self._open_one(entry, None if above is None else self._packed[above])
            except CacheCapacityError:
                failed.add(entry)
        if not failed:
            return
        for entry in reversed(step.started):
            if entry in failed and isinstance(entry, RequestEntry):
                self._wait_again(self._jobs[entry])
            elif entry in failed and isinstance(entry, SharedEntry):
                self._scheduler.give_up(entry)
        step.started = [entry for entry in step.started if entry not in failed]
        step.pieces = [piece for piece in step.pieces if piece.entry not in failed]

    def _open_one(self, entry: Entry, above: PackedRequest | None) -> None:
        if isinstance(entry, SharedEntry):
            self._packed[entry] = self._runner.open(above, entry.length, decodes=False)
        else:
            job = self._jobs[entry]
            job.start()
            capacity = len(job.token_ids) + job.sampling.max_new_tokens
            job.packed = self._runner.open(above, entry.rows_at_start, capacity=capacity)

    def _launch(self, job: BatchJob) -> list[BatchResult]:
        """Have a strategy launch the prefill of the whole prompt; return the result of a job that fails."""
        job.start()
        kv = RequestKV(self._engine.pool)
        try:
            self._launch_into(kv, job)
        except CacheCapacityError as error:
            kv.release()
            self._wait_again(job, error)
        except (RagkitError, torch.OutOfMemoryError) as error:
            kv.release()
            return [self._failed(job, error)]
        except BaseException:  # it ends the run, which knows nothing of these rows yet
            kv.release()
            raise
        return []

    def _launch_into(self, kv: RequestKV, job: BatchJob) -> None:
        assert job.strategy is not None
        answer = job.sampling.max_new_tokens
        request = PrefillRequest(job.prompt, kv, self._rotary, job.request.ratio, answer)
        launched = launch(job.strategy, self._engine.decoder, request)
        try:
            kv.reserve(job.entry.rows)
            job.packed = self._runner.adopt(kv, len(job.token_ids) + answer)
        except BaseException:
            launched.finish()  # it lets go of what it holds
            raise
        self._launched.append((job, launched))

    def _first_tokens(self) -> list[BatchResult]:
        """Take the first tokens of what strategies prefilled; the host waits once for all of them."""
        if not self._launched:
            return []
        likeliest = torch.stack([launched.logits for _, launched in self._launched]).argmax(dim=-1).tolist()
        return [result for token in likeliest for result in self._first_token(*self._launched.pop(0), token)]

    def _first_token(self, job: BatchJob, launched: LaunchedPrefill, likeliest: int) -> list[BatchResult]:
        entry = job.entry
        try:
            prefilled = job.prefilled = launched.finish()
            if prefilled.afterwards is not None:  # nobody waits for this very token
                prefilled.afterwards()
        except (RagkitError, torch.OutOfMemoryError) as error:
            return [self._failed(job, error)]
        self._count_prefilled(job, prefilled)
        blocks = job.rows.kv.num_reserved // self._engine.pool.block_size
        if entry.replayed:
            self._scheduler.prefilled_by_strategy(entry, blocks)
            return []
        results = self._taken(job, job.take(prefilled.logits.unsqueeze(0), [likeliest], None, None))
        entry.blocks = blocks
        return results

    def _let_go(self) -> None:
        """Let go of what prefills hold of which nothing was taken, because of an error."""
        while self._launched:
            self._launched.pop()[1].finish()

    def _reserve(self, job: BatchJob, step: BatchStep) -> bool:
        """Return whether there are rows for the job's next token, and for its drafts; else it waits again."""
        kv, entry = job.rows.kv, job.entry
        try:
            kv.reserve(kv.num_tokens + 1 + step.drafts.get(entry, 0))
            return True
        except CacheCapacityError:
            if step.drafts.pop(entry, 0):  # it can do without
                entry.blocks = self._engine.pool.blocks_for(entry.rows)
                return self._reserve(job, step)
            self._wait_again(job)
            return False

    def _packed_piece(self, piece: Piece) -> PackedPiece:
        entry = piece.entry
        if isinstance(entry, SharedEntry):
            return PackedPiece(self._packed[entry], self._shared[entry][piece.start : piece.stop], wants_logits=False)
        job = self._jobs[entry]
        return PackedPiece(job.rows, job.tokens(piece.start, piece.stop), wants_logits=piece.is_last)

    def _taken(self, job: BatchJob, reason: FinishReason | None) -> list[BatchResult]:
        """Note that a job has new tokens; return its result if it ended."""
        if reason is not None:
            result = job.result(reason, self._engine.tokenizer)
            self._end(job)
            return [result]
        if job.entry.generated == job.entry.replayed:
            self._scheduler.started_answer(job.entry)
        job.entry.generated = len(job.answer)
        return []

    def _wait_again(self, job: BatchJob, error: RagkitError | None = None) -> None:
        """Let a job wait that found the pool taken; after some times, fail."""
        final = out_of_patience(job, error)
        if final is not None:
            self._gave_up.append(self._failed(job, final))
        else:
            self._scheduler.preempt(job.entry)

    def _failed(self, job: BatchJob, error: BaseException) -> BatchResult:
        self._end(job)
        return failed(job, error)

    def _end(self, job: BatchJob) -> None:
        self._scheduler.end(job.entry)
        del self._jobs[job.entry]
        self._begun.discard(job.entry)

    def _release(self, entry: Entry) -> None:
        packed = self._packed.pop(entry, None) if isinstance(entry, SharedEntry) else self._jobs[entry].packed
        if packed is not None:
            self._runner.close(packed)
        if isinstance(entry, RequestEntry):
            job = self._jobs[entry]
            job.packed = None
            if job.drafted is not None:
                job.drafted.pause()

    def _give_back(self, entry: RequestEntry) -> bool:
        """Give up blocks that only drafts of an entry need, or else those of its drafter."""
        job = self._jobs[entry]
        kv, pool = job.rows.kv, self._engine.pool
        freed = kv.give_back(kv.num_tokens + 1)
        entry.blocks -= freed
        return freed > 0 or (job.drafted is not None and job.drafted.gives_way(pool))

    def _count(self, step: BatchStep) -> None:
        for entry in step.started:
            if entry not in self._begun:
                self._begun.add(entry)
                own = entry.length if isinstance(entry, SharedEntry) else entry.prompt_tokens
                self._stats.prefill_tokens_needed += own
                if isinstance(entry, RequestEntry):
                    size = len(self._jobs[entry].token_ids)
                    self._stats.prompt_tokens += size
                    self._stats.prefill_tokens_shared += size
                self._stats.prefill_tokens_shared -= own

    def _count_prefilled(self, job: BatchJob, prefilled: PrefillResult) -> None:
        stats, size = self._stats, len(job.token_ids)
        assert job.strategy is not None
        self._recomputed[job.strategy.name] = prefilled.recomputed / size
        stats.prefill_tokens_computed += prefilled.recomputed
        if job.entry in self._begun:
            stats.prefill_tokens_repeated += prefilled.recomputed
            return
        self._begun.add(job.entry)
        stats.prompt_tokens += size
        stats.prefill_tokens_needed += prefilled.recomputed
        stats.prefill_tokens_reused += prefilled.reused

    def _count_bytes(self) -> None:
        held = [job.packed.kv for job in self._jobs.values() if job.packed is not None]
        block = self._engine.pool.block_size * self._engine.pool.layout.bytes_per_token
        fields = sum(kv.field.nbytes for kv in held if kv.field is not None)
        own = len({one for kv in [*held, *(one.kv for one in self._packed.values())] for one in kv.block_ids})
        listed = sum(len(kv.block_ids) for kv in held)
        self._stats.kv_bytes_peak = max(self._stats.kv_bytes_peak, own * block + fields)
        self._stats.kv_bytes_listed_peak = max(self._stats.kv_bytes_listed_peak, listed * block + fields)
