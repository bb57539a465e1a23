"""Rows of a batch, answered in the workers of a Ray cluster: shards of rows on workers with an engine each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from ragkit.config import PipelineConfig, Strategy
from ragkit.errors import JobError
from ragkit.jobs.answering import BatchGenerator, answer_many, batch_generator
from ragkit.jobs.executor import StopRequested, Watch
from ragkit.jobs.ray_cluster import RayCluster
from ragkit.jobs.ray_executor import refuse_given, worker_config
from ragkit.jobs.ray_pool import ActorPool
from ragkit.jobs.ray_tasks import Call, Steps, TaskRunner
from ragkit.jobs.ray_worker import WorkerIdentity, limit_threads
from ragkit.jobs.rows import QuestionRow, RowError, RowOutcome
from ragkit.parts import Parts
from ragkit.progress import Silent
from ragkit.settings import forbid_network

if TYPE_CHECKING:
    from ragkit.store import Store

SHARD_ROWS = 64  # what a lost worker costs, and what a worker's engine may batch
_STOP_S = 60.0  # that workers have, when a stop is asked for, to end the answers at hand
_WAITING_ROWS = 4096  # of documents in pages, until they are handed out


class RayAnswerer:
    """Answers rows with an engine of its own, one shard at a time; it only reads the store.

    Args:
        config: which models, and how.
        folder: the store's, or a copy of it in the same place.
        threads: how many a model may use.
    """

    def __init__(self, config: PipelineConfig, folder: str, threads: int) -> None:
        if config.offline:
            forbid_network(os.environ)
        self._parts = Parts(Path(folder), config)
        self._threads = threads
        self._generator: BatchGenerator | None = None
        self._stop = Event()

    def start(self) -> WorkerIdentity:
        """Load the models and return who this is.

        Raises:
            StoreMissingError: the store is not here.
        """
        limit_threads(self._threads)
        store: Store = self._parts.store
        _ = self._parts.retriever
        self._generator = batch_generator(self._parts)
        return WorkerIdentity(os.uname().nodename, generation=store.generation)

    def answer(self, rows: Sequence[QuestionRow]) -> list[RowOutcome]:
        """Return what becomes of each row, in their order; after `stop`, of those that have ended."""
        ended = answer_many(self._parts, rows, generator=self._generator, stop=self._stop)
        outcomes = {one.row.number: one for one in ended}
        return [outcomes[row.number] for row in rows if row.number in outcomes]

    def stop(self) -> None:
        """Begin no more rows: what runs ends after the answer at hand. Called while `answer` runs."""
        self._stop.set()


@dataclass(frozen=True, slots=True)
class _RowShard:
    """Rows that one worker answers together: a `Task` of the runner."""

    rows: Sequence[QuestionRow]

    def steps(self) -> Steps[list[RowOutcome]]:
        outcomes: list[RowOutcome] = yield Call("answer", "answer", (self.rows,))
        return outcomes

    def parts(self) -> Sequence[_RowShard]:
        return [_RowShard([row]) for row in self.rows] if len(self.rows) > 1 else []

    def failed(self, step: str, code: str, message: str) -> list[RowOutcome]:
        return [RowOutcome(row, error=RowError(code, message)) for row in self.rows]


def answer_on_ray(parts: Parts, rows: Iterable[QuestionRow], stop: Event) -> Iterator[RowOutcome]:
    """Yield what becomes of every row once, until `stop` is set: then workers hand over what they have answered.

    A row that keeps killing its workers fails alone.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: a model was handed to the pipeline.
        JobError: the cluster cannot be used, or a worker has another state of the store.
    """
    refuse_given(parts)
    with RayCluster(parts.config.jobs) as cluster:
        cluster.connect()
        pool = _pool(parts, cluster)
        runner = TaskRunner(cluster.ray, {"answer": pool}, Watch(Silent(), stop).check)
        try:
            for outcomes in runner.run(_RowShard(one) for one in shards(rows, parts.config.generation.strategy)):
                yield from outcomes
        except StopRequested:  # what workers have answered of their shards is kept, too
            pool.ask_to_stop()
            for outcomes in runner.drain(_STOP_S):
                yield from outcomes
        finally:
            pool.close()


def _pool(parts: Parts, cluster: RayCluster) -> ActorPool:
    generation = parts.store.generation

    def check(identity: WorkerIdentity) -> None:
        if identity.generation != generation:
            raise JobError(
                f"the store on {identity.node} is of generation {identity.generation}, and here it is of {generation}: "
                f"copy {parts.folder.resolve()} there again"
            )

    gpus = cluster.gpus(parts.config.device)
    cpus = 1.0 if gpus else cluster.worker_cpus
    arguments = (worker_config(parts.config, gpus), str(parts.folder.resolve()), max(1, int(cpus)))
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 1 if gpus else 0}
    size = gpus or max(1, cluster.room())
    return ActorPool(cluster.ray, "answering", size, RayAnswerer, arguments, options, check, hears=True)


def shards(rows: Iterable[QuestionRow], configured: Strategy) -> Iterator[Sequence[QuestionRow]]:
    """Yield rows in shards. Those that may read a document in pages wait, and come with others of that document alone.

    The first shards of all documents come before their second ones: where there are enough documents, no two workers
    read the same one.

    Args:
        rows: what is asked.
        configured: the strategy of a row that names none.
    """
    mixed: list[QuestionRow] = []
    waiting: dict[tuple[str | None, str | None], list[QuestionRow]] = {}
    count = 0
    for row in rows:
        if _may_be_paged(row, configured):
            waiting.setdefault((row.changes.document, row.changes.system_prompt), []).append(row)
            count += 1
        else:
            mixed.append(row)
        if len(mixed) == SHARD_ROWS:
            yield mixed
            mixed = []
        if count == _WAITING_ROWS:
            yield from _by_document(waiting.values())
            waiting, count = {}, 0
    if mixed:
        yield mixed
    yield from _by_document(waiting.values())


def _by_document(groups: Iterable[Sequence[QuestionRow]]) -> Iterator[Sequence[QuestionRow]]:
    left = list(groups)
    while left:
        yield from (group[:SHARD_ROWS] for group in left)
        left = [group[SHARD_ROWS:] for group in left if len(group) > SHARD_ROWS]


def _may_be_paged(row: QuestionRow, configured: Strategy) -> bool:
    """Return whether a row may read a document whole, as far as it can be told without the store."""
    asked, changes = row.changes.strategy or configured, row.changes
    return asked == Strategy.PAGES or (asked == Strategy.AUTO and changes.document is not None and not changes.filter)
