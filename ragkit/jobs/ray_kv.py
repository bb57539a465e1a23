"""The KV of all chunks, computed ahead in the workers of a Ray cluster.

A chunk's KV is thousands of times its text, so workers write it themselves, as segments into the store's folder on
shared storage; the driver, which holds the writer's lock, only records where it lies. A segment that never came to be
recorded is removed by the next `gc`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

from ragkit.config import ChunkContextName
from ragkit.errors import JobError, UsageError
from ragkit.jobs.executor import StopRequested, Watch
from ragkit.jobs.ray_cluster import RayCluster
from ragkit.jobs.ray_executor import refuse_given, worker_config
from ragkit.jobs.ray_kv_worker import ListedKV, RayKVWorker, WrittenKV
from ragkit.jobs.ray_pool import ActorPool
from ragkit.jobs.ray_tasks import Call, Steps, TaskRunner
from ragkit.jobs.ray_worker import WorkerIdentity
from ragkit.progress import Progress
from ragkit.reports import KVIngestReport, too_long_warnings
from ragkit.store import Store
from ragkit.store.base import StoredChunk
from ragkit.types import Chunk

if TYPE_CHECKING:
    from ragkit.parts import Parts

SHARD_CHUNKS = 64  # what a lost worker costs
_SPARE_NEIGHBOURS = 2  # shipped beyond the configured tokens: a segment may take fewer tokens than its chunk counts

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Ledger:
    """What a run has asked for: KV is computed once, for the first chunk of its text, and only within the budget."""

    store: Store
    budget_bytes: int
    planned_bytes: int
    claims: dict[str, tuple[int, ...]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)  # chunks whose KV was there before the run
    too_long: set[str] = field(default_factory=set)  # chunks that no prompt has room for

    def wanted(self, listed: Sequence[ListedKV], place: tuple[int, ...]) -> set[str]:
        """Return the chunks that the shard at `place` is to compute, the same ones when it asks again."""
        self.too_long |= {one.chunk_id for one in listed if not one.fits_a_prompt}
        listed = [one for one in listed if one.fits_a_prompt]
        stored = self.store.kv_entries([one.key for one in listed])
        self.present |= {one.chunk_id for one in listed if one.key in stored and one.key not in self.claims}
        chunk_ids: set[str] = set()
        for one in listed:
            owner = self.claims.get(one.key)
            if one.key in stored or (owner is not None and owner != place[: len(owner)]):
                continue
            if owner is None:
                if self.planned_bytes + one.estimated_bytes > self.budget_bytes:
                    self.left_out.add(one.key)
                    continue
                self.claims[one.key] = place
                self.planned_bytes += one.estimated_bytes
            chunk_ids.add(one.chunk_id)
        unique = {one.key: one.chunk_id for one in reversed(listed)}  # equal texts within the shard: the first
        return chunk_ids & set(unique.values())


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a shard: its segments, or why there are none."""

    chunks: int
    written: Sequence[WrittenKV] = ()
    lost: str = ""


@dataclass(frozen=True, slots=True)
class _KVShard:
    """Chunks whose KV is named, compared with the catalogue, computed and written: a `Task` of the runner."""

    place: tuple[int, ...]
    chunks: Sequence[Chunk]
    before: Sequence[StoredChunk]
    ledger: _Ledger

    def steps(self) -> Steps[_Outcome]:
        listed = yield Call("prefill", "names", (self.chunks, self.before))
        wanted = self.ledger.wanted(listed, self.place)
        written: Sequence[WrittenKV] = ()
        if wanted:
            missing = [chunk for chunk in self.chunks if chunk.chunk_id in wanted]
            written = yield Call("prefill", "compute", (missing, self.before))
        return _Outcome(len(self.chunks), written)

    def parts(self) -> Sequence[_KVShard]:
        if len(self.chunks) < 2:
            return []
        return [
            _KVShard((*self.place, number), [chunk], self.before, self.ledger)
            for number, chunk in enumerate(self.chunks)
        ]

    def failed(self, step: str, code: str, message: str) -> _Outcome:
        return _Outcome(len(self.chunks), (), f"chunk {self.chunks[0].chunk_id}: {message}")


class RayKVIngest:
    """One run over all chunks of a store. Not reusable.

    Args:
        parts: the pipeline's.
        cluster: where the workers run.
        progress: hears of chunks.
        stop: asks for an end; what is recorded stays.
    """

    def __init__(self, parts: Parts, cluster: RayCluster, progress: Progress, stop: Event | None = None) -> None:
        refuse_given(parts)
        self._parts = parts
        self._store = parts.store
        self._cluster = cluster
        self._watch = Watch(progress, stop or Event())
        self._generator = ""

    def run(self) -> tuple[KVIngestReport, tuple[str, ...]]:
        """Compute and record what is missing; return what was done, and warnings.

        Raises:
            UsageError: the store keeps no KV.
            StoreError: the store is locked, or the disk is full; what was recorded stays.
            JobError: the cluster cannot be used.
        """
        config = self._parts.config
        if not config.kv.disk_mb:
            raise UsageError("on Ray the KV of chunks is written to the store: set kv.disk_mb above 0")
        self._cluster.connect()
        with self._store.writer(lock_timeout_s=config.ingest.lock_timeout_s) as writer, self._workers() as pool:
            row_ids = self._store.row_ids()
            self._watch.progress.start(len(row_ids), 0, "chunks")
            ledger = _Ledger(self._store, config.kv.disk_mb << 20, self._store.kv_totals().bytes)
            runner = TaskRunner(self._cluster.ray, {"prefill": pool}, self._watch.check)
            computed = kv_bytes = seen = 0
            lost: list[str] = []
            try:
                for outcome in runner.run(self._shards(ledger)):
                    for written in outcome.written:
                        writer.record_kv(written.segment, written.entries)
                        computed += len(written.entries)
                        kv_bytes += written.kv_bytes
                    if outcome.lost:
                        lost.append(outcome.lost)
                    seen += outcome.chunks
                    tokens = sum(written.tokens for written in outcome.written)
                    sizes = sum(written.kv_bytes for written in outcome.written)
                    self._watch.progress.advance(documents=outcome.chunks, bytes=sizes, tokens=tokens)
            except StopRequested:
                logger.info("stopped; the KV of %d chunks is left to the next run", len(row_ids) - seen)
        present, left_out = len(ledger.present), len(ledger.left_out)
        shared = max(0, seen - computed - len(lost) - left_out - present - len(ledger.too_long))
        return KVIngestReport(computed, present, kv_bytes, shared, left_out), self._warnings(ledger, lost)

    @contextlib.contextmanager
    def _workers(self) -> Iterator[ActorPool]:
        config = self._parts.config
        folder = self._parts.folder.resolve()
        witness = folder / "segments" / f".tmp-{secrets.token_hex(8)}"
        witness.parent.mkdir(exist_ok=True)
        witness.touch()
        gpus = self._cluster.gpus(config.device)
        cpus = 1.0 if gpus else self._cluster.worker_cpus
        name = str(witness.relative_to(folder))
        arguments = (worker_config(config, gpus), str(folder), max(1, int(cpus)), name)
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 1 if gpus else 0}
        size = gpus or max(1, self._cluster.room())
        pool = ActorPool(self._cluster.ray, "prefill", size, RayKVWorker, arguments, options, self._check)
        try:
            yield pool
        finally:
            pool.close()
            witness.unlink(missing_ok=True)

    def _check(self, identity: WorkerIdentity) -> None:
        """Raise `JobError` where workers have different weights: their KV would not be one store's."""
        self._generator = self._generator or identity.generator
        if identity.generator != self._generator:
            raise JobError(
                f"the Ray worker on {identity.node} has other weights of {self._parts.config.generation.model} than "
                "the workers before it: install the same models on every node"
            )

    def _shards(self, ledger: _Ledger) -> Iterator[_KVShard]:
        row_ids = self._store.row_ids()
        for number, start in enumerate(range(0, len(row_ids), SHARD_CHUNKS)):
            stored = self._store.chunks(row_ids[start : start + SHARD_CHUNKS])
            yield _KVShard((number,), [one.chunk for one in stored], self._before(stored), ledger)

    def _before(self, stored: Sequence[StoredChunk]) -> list[StoredChunk]:
        """Return the chunks, and those before them that their KV may be computed behind."""
        config = self._parts.config.kv
        if config.context is not ChunkContextName.NEIGHBOURS:
            return []
        shipped = {(one.chunk.doc_id, one.chunk.index): one for one in stored}
        for one in stored:
            tokens = spare = 0
            for index in range(one.chunk.index - 1, -1, -1):
                place = (one.chunk.doc_id, index)
                before = shipped.get(place) or self._store.chunk_at(*place)
                if before is None:
                    break
                shipped[place] = before
                tokens += before.chunk.token_count
                spare += tokens > config.neighbour_tokens
                if spare > _SPARE_NEIGHBOURS:
                    break
        return list(shipped.values())

    def _warnings(self, ledger: _Ledger, lost: Sequence[str]) -> tuple[str, ...]:
        warnings = [*too_long_warnings(len(ledger.too_long))]
        warnings += [f"the KV of {one} and was left out" for one in lost]
        if ledger.left_out:
            warnings.append(
                f"the KV of {len(ledger.left_out):,} chunks was left out, because disk ({ledger.budget_bytes >> 20:,} "
                "MB) is full: raise kv.disk_mb, or take a smaller kv.codec; they are computed when they are first used"
            )
        return tuple(warnings)
