"""The steps of an ingest in the workers of a Ray cluster: embedding on GPUs where there are any, the rest on CPUs.

A shard of the plan is one commit group. Text, chunks and vectors come back to the driver, which commits them: vectors
are a third of what it writes anyway, and the row ids that their segment holds are the committer's to give.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ragkit.chunking.base import Chunker
from ragkit.config import Device, PipelineConfig
from ragkit.errors import JobError, ReadError, UsageError
from ragkit.jobs.executor import PreparedGroup, Watch
from ragkit.jobs.local_executor import PART_DOCUMENTS
from ragkit.jobs.plan import PlannedSource
from ragkit.jobs.ray_cluster import RayCluster
from ragkit.jobs.ray_pool import ActorPool
from ragkit.jobs.ray_tasks import Call, Divided, Steps, TaskRunner
from ragkit.jobs.ray_worker import LargeTable, RayWorker, WorkerIdentity
from ragkit.jobs.steps import FailedPreparation, Known, Outcome, PreparedSource
from ragkit.store.base import IndexedDocument, KnownDocument

if TYPE_CHECKING:
    from ragkit.parts import Parts

# A shard ends with these bytes of files: about as many chunks as a local commit group, half a minute of embedding.
SHARD_BYTES = 512 << 10
SHARD_SOURCES = 64
_SHARDS_A_WORKER = 4  # at least, of a small plan

_READ, _EMBED = "read", "embed"


@dataclass(frozen=True, slots=True)
class IngestShard:
    """Sources that are read, chunked and embedded together: a `Task` of the runner."""

    items: Sequence[PlannedSource]
    known: Known

    def steps(self) -> Steps[PreparedGroup | Divided]:
        """Read; ask the store which documents it has; chunk; embed. A table of many documents becomes its parts."""
        ids, results = yield Call(_READ, "read", ([item.source for item in self.items],), keeps_last=True)
        if any(isinstance(one, LargeTable) for one in ids):
            return Divided(self.parts() or table_parts(self.items[0], ids[0], self.known))
        outcomes, seconds = yield from _chunked_and_embedded(ids, results, self.known)
        return PreparedGroup(list(zip(self.items, outcomes, strict=True)), seconds)

    def parts(self) -> Sequence[IngestShard]:
        """Return one shard a source."""
        return [IngestShard([item], self.known) for item in self.items] if len(self.items) > 1 else []

    def failed(self, step: str, code: str, message: str) -> PreparedGroup:
        """Return the group whose only source has failed."""
        (item,) = self.items
        return _failed(item, step, code, message)


@dataclass(frozen=True, slots=True)
class TablePart:
    """Documents `start` to `stop` of a large table, which no worker has to hold whole: a `Task` of the runner."""

    item: PlannedSource
    table: LargeTable
    start: int
    stop: int
    known: Known

    def steps(self) -> Steps[PreparedGroup | Divided]:
        """Read, as a rule from the disk of the worker that has read the table; then as a shard."""
        ids, results = yield Call(_READ, "read_part", (self.table, self.start, self.stop), keeps_last=True)
        (outcome,), seconds = yield from _chunked_and_embedded(ids, results, self.known)
        if isinstance(outcome, PreparedSource):
            outcome = dataclasses.replace(outcome, more=self.stop < self.table.stops[-1])
        return PreparedGroup([(self.item, outcome)], seconds)

    def parts(self) -> Sequence[TablePart]:
        """Return nothing: a part is not divided."""
        return []

    def failed(self, step: str, code: str, message: str) -> PreparedGroup:
        """Return the group of the table, which has failed with this part."""
        return _failed(self.item, "read" if step == "read_part" else step, code, message)


def table_parts(item: PlannedSource, table: LargeTable, known: Known) -> Sequence[TablePart]:
    """Return one task a part of a table."""
    starts = (0, *table.stops[:-1])
    return [TablePart(item, table, start, stop, known) for start, stop in zip(starts, table.stops, strict=True)]


def _chunked_and_embedded(
    ids: Sequence[Sequence[str]], results: Any, known: Known
) -> Steps[tuple[Sequence[Outcome], dict[str, float]]]:
    """Chunk and embed what a worker has read, but for documents that are stored already; `results` stays there."""
    stored = frozenset(doc_id for doc_id in {doc_id for ids_here in ids for doc_id in ids_here} if known(doc_id))
    seconds, chunked = yield Call(_READ, "chunk", (results, stored), keeps_last=True)
    outcomes, took = yield Call(_EMBED, "embed", (chunked,))
    return outcomes, {**took, "chunk": seconds}


def _failed(item: PlannedSource, step: str, code: str, message: str) -> PreparedGroup:
    error = ReadError(f"{item.source.uri}: {message}", code=code, stage=step)
    return PreparedGroup([(item, FailedPreparation(item.source, error))])


class RayExecutor:
    """Prepares shards of a plan in a cluster's workers.

    Args:
        parts: the pipeline's; its models say what the workers' must be.
        chunker: cuts documents; workers make one of equal fingerprint.
        cluster: where the workers run.

    Raises:
        UsageError: a model was handed to the pipeline, which workers cannot load by its name.
    """

    def __init__(self, parts: Parts, chunker: Chunker, cluster: RayCluster) -> None:
        refuse_given(parts)
        self._parts = parts
        self._cluster = cluster
        self._wanted = WorkerIdentity("", chunker.fingerprint, parts.chunk_embedder.embedder_id)
        self._pools: dict[str, ActorPool] = {}

    def prepare(self, work: Sequence[PlannedSource], known: Known, watch: Watch) -> Iterator[PreparedGroup]:
        """Yield one group a shard, in order; a source that keeps killing workers is a group by itself."""
        if not work:
            return
        started = time.monotonic()
        self._cluster.connect()
        self._start_pools()
        workers = max(pool.size for pool in self._pools.values())
        runner = TaskRunner(self._cluster.ray, self._pools, watch.check)
        start: dict[str, float] = {}
        failed = ""
        for group in runner.run(IngestShard(items, known) for items in shards_of(work, workers)):
            seconds = group.seconds
            if not start:
                start["start_workers"] = max(pool.first_ready for pool in self._pools.values()) - started
                seconds = {**group.seconds, **start}
            item, outcome = group.outcomes[0]
            if item.source.uri == failed:  # parts behind one that failed: without it the table is not whole
                continue
            failed = item.source.uri if isinstance(outcome, FailedPreparation) and len(group.outcomes) == 1 else ""
            outcomes = [(item, _unless_known(outcome, known)) for item, outcome in group.outcomes]
            watch.progress.advance(tokens=_tokens(outcomes))
            yield PreparedGroup(outcomes, seconds)

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _start_pools(self) -> None:
        config = self._parts.config
        gpus = self._cluster.gpus(config.device)
        if gpus:
            self._pools[_READ] = self._pool("reading", self._cluster.room() or 1, 0, reads=True, embeds=False)
            self._pools[_EMBED] = self._pool("embedding", gpus, 1, reads=False, embeds=True)
        else:  # every step on every core, so that none waits for a step that has nothing to do
            size = max(1, self._cluster.room())
            self._pools[_READ] = self._pools[_EMBED] = self._pool("ingest", size, 0, reads=True, embeds=True)

    def _pool(self, purpose: str, size: int, gpus: int, **steps: bool) -> ActorPool:
        cpus = 1.0 if gpus else self._cluster.worker_cpus
        config = worker_config(self._parts.config, gpus)
        arguments = (config, str(self._parts.folder.resolve()), max(1, int(cpus)), *steps.values(), PART_DOCUMENTS)
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
        return ActorPool(self._cluster.ray, purpose, size, RayWorker, arguments, options, self._check)

    def _check(self, identity: WorkerIdentity) -> None:
        """Raise `JobError` where a worker's chunks or vectors would not be those of this machine."""
        for name, got, wanted in (
            ("chunker", identity.chunker, self._wanted.chunker),
            ("embedder", identity.embedder_id, self._wanted.embedder_id),
        ):
            if got and got != wanted:
                raise JobError(
                    f"the Ray worker on {identity.node} has another {name} ({got}) than this machine ({wanted}): "
                    "install the same ragkit and the same models on every node"
                )


def refuse_given(parts: Parts) -> None:
    """Raise `UsageError` where a model was handed to the pipeline, which workers cannot load by its name."""
    if parts.given:
        raise UsageError(
            "--engine ray loads models in its workers by their names, and the pipeline was handed its own "
            f"{' and '.join(parts.given)}: name a model folder in the configuration instead"
        )


def worker_config(config: PipelineConfig, gpus: float) -> PipelineConfig:
    """Return the configuration of a worker, whose device is what Ray gave it."""
    return dataclasses.replace(config, device=Device.CUDA if gpus else Device.CPU)


def shards_of(work: Sequence[PlannedSource], workers: int) -> Iterator[Sequence[PlannedSource]]:
    """Yield the plan in pieces, in order: small enough that each worker gets some, and that a lost one costs little."""
    limit = min(SHARD_BYTES, sum(item.source.size for item in work) // (_SHARDS_A_WORKER * workers))
    start = size = 0
    for stop, item in enumerate(work, 1):
        size += item.source.size
        if size >= limit or stop - start == SHARD_SOURCES:
            yield work[start:stop]
            start, size = stop, 0
    if start < len(work):
        yield work[start:]


def _unless_known(outcome: Outcome, known: Known) -> Outcome:
    """Return the outcome without documents that another shard has brought into the store meanwhile."""
    if isinstance(outcome, FailedPreparation):
        return outcome
    documents = tuple(
        KnownDocument(one.document.doc_id, one.document.uri, one.document.metadata)
        if isinstance(one, IndexedDocument) and known(one.document.doc_id)
        else one
        for one in outcome.documents
    )
    return dataclasses.replace(outcome, documents=documents)


def _tokens(outcomes: Sequence[tuple[PlannedSource, Outcome]]) -> int:
    embedded = {
        one.document.doc_id: one.chunks
        for _, outcome in outcomes
        if isinstance(outcome, PreparedSource)
        for one in outcome.documents
        if isinstance(one, IndexedDocument)
    }
    return sum(chunk.token_count for chunks in embedded.values() for chunk in chunks)
