"""The seam between a job and what runs its steps: this process, or the workers of a Ray cluster.

An executor reads, chunks and embeds and hands over groups in the order of the plan; the one committer, which holds the
store's writer lock, stores them. So what is stored does not depend on where the steps ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Protocol

from ragkit.jobs.plan import PlannedSource
from ragkit.jobs.steps import Known, Outcome
from ragkit.jobs_config import ExecutorName, JobsConfig
from ragkit.progress import Progress

if TYPE_CHECKING:
    from ragkit.chunking.base import Chunker
    from ragkit.jobs.ray_cluster import RayCluster
    from ragkit.parts import Parts


class StopRequested(Exception):
    """Leaves work that is not committed yet; the next run does it again."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who hears of the advance, and the event that asks for a stop."""

    progress: Progress
    stop: Event

    def check(self) -> None:
        """Raise `StopRequested` where a stop was asked for."""
        if self.stop.is_set():
            raise StopRequested


@dataclass(frozen=True, slots=True)
class PreparedGroup:
    """One commit group: sources and what became of each, in the order of the plan.

    `seconds` says what the steps took: `chunk`, `embed`, and `embed_cpu` of all cores.
    """

    outcomes: Sequence[tuple[PlannedSource, Outcome]]
    seconds: Mapping[str, float] = field(default_factory=dict)


class Executor(Protocol):
    """Runs the steps of an ingest. A context manager: leaving it ends what it started."""

    def prepare(self, work: Sequence[PlannedSource], known: Known, watch: Watch) -> Iterator[PreparedGroup]:
        """Yield every source of `work` once, in order, a bounded distance ahead of whoever commits them.

        What is wrong with one source never stops the others.

        Args:
            work: what is to be read.
            known: says which documents are stored already; asked in the caller's thread.
            watch: hears of tokens, and may ask for a stop.

        Raises:
            StopRequested: a stop was asked for; what was yielded stays.
            JobError: the executor cannot go on.
        """
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(self, *_: object) -> None: ...


def open_cluster(config: JobsConfig) -> AbstractContextManager[RayCluster | None]:
    """Give the Ray cluster of a job, which is connected to when it is first needed; None for the local executor.

    Raises:
        MissingExtraError: Ray is asked for and is not installed.
    """
    if config.engine is not ExecutorName.RAY:
        return nullcontext()
    from ragkit.jobs.ray_cluster import RayCluster

    return RayCluster(config)


def open_executor(parts: Parts, chunker: Chunker, cluster: RayCluster | None) -> Executor:
    """Return the executor for ingesting with `parts`: in the workers of a cluster, or here where there is none."""
    if cluster is not None:
        from ragkit.jobs.ray_executor import RayExecutor

        return RayExecutor(parts, chunker, cluster)
    from ragkit.jobs.local_executor import LocalExecutor

    return LocalExecutor(parts.config, chunker, parts.chunk_embedder)
