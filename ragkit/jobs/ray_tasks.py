"""Tasks on pools of Ray actors: in order, a bounded number at once, begun anew where a worker dies.

Ray's own retries are off: what a killed worker was asked for is known here, so a task that keeps killing its workers
can be told from its neighbours, divided, and given up alone.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

from ragkit.errors import JobError, RagkitError
from ragkit.jobs.ray_pool import Actor, ActorPool

_Result = TypeVar("_Result", covariant=True)
_T = TypeVar("_T")

DIVISIBLE_ATTEMPTS = 2  # of a task that can be divided, before it is
LAST_ATTEMPTS = 3  # of one that cannot, before it has failed
_POLL_S = 0.5
_PATIENCE_S = 300.0  # without a worker that is ready

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One step of a task: what a worker of a pool is asked for.

    With `keeps_last` the method returns two values, and the second stays in the cluster: the task gets a reference,
    which a later call may hand on.
    """

    pool: str
    method: str
    arguments: tuple[Any, ...]
    keeps_last: bool = False


Steps = Generator[Call, Any, _T]


@dataclass(frozen=True, slots=True)
class Divided:
    """What the steps of a task return where it turned out to be several, which take its place in this order."""

    tasks: Sequence[Task[Any]]


class Task(Protocol[_Result]):
    """Work of some calls, one after the other."""

    def steps(self) -> Steps[_Result | Divided]:
        """Return a generator that yields calls, is sent what each returned, and returns the task's result.

        It is run anew from its start where a worker dies.
        """
        ...

    def parts(self) -> Sequence[Task[_Result]]:
        """Return smaller tasks that together are this one; none where it cannot be divided."""
        ...

    def failed(self, step: str, code: str, message: str) -> _Result:
        """Return the result of a task whose workers keep dying: `step` is the method, `code` is `crash` or `oom`."""
        ...


@dataclass(slots=True, order=True)
class _Run(Generic[_T]):
    """A task on its way; `order` is its place among all."""

    order: tuple[int, ...]
    task: Task[_T] = field(compare=False)
    steps: Steps[_T | Divided] | None = field(default=None, compare=False)
    call: Call | None = field(default=None, compare=False)
    attempts: int = field(default=0, compare=False)
    result: _T | Divided | None = field(default=None, compare=False)
    is_done: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class _Running:
    """A call that a worker has: `handle` is the worker's at that time, `kept` what stays in the cluster."""

    run: _Run[Any]
    pool: ActorPool
    actor: Actor
    handle: Any
    kept: Any


class TaskRunner:
    """Runs tasks on pools of actors.

    Args:
        ray: the module.
        pools: by the name that calls use; two names may mean one pool.
        check: raises where a stop was asked for; called at least twice a second.
    """

    def __init__(self, ray: ModuleType, pools: Mapping[str, ActorPool], check: Callable[[], None]) -> None:
        self._ray = ray
        self._pools = pools
        self._check = check
        self._waiting: dict[int, list[_Run[Any]]] = {id(pool): [] for pool in pools.values()}
        self._running: dict[Any, _Running] = {}
        self._slots: deque[list[_Run[Any]]] = deque()
        self._deaths = 0

    @property
    def deaths(self) -> int:
        """Workers that died so far."""
        return self._deaths

    def run(self, tasks: Iterable[Task[_T]]) -> Iterator[_T]:
        """Yield the results of `tasks` in their order; those of a divided task one after the other.

        Tasks are drawn, and results kept, only so far ahead of the caller that every worker has something to do.

        Raises:
            RagkitError: a worker cannot work at all.
        """
        window = 3 * sum(pool.size for pool in self._distinct()) + 2
        slots: deque[list[_Run[_T]]] = deque()
        self._slots = slots
        coming, number = iter(tasks), 0
        is_drawn = False
        while True:
            while not is_drawn and len(slots) < window:
                task = next(coming, None)
                if task is None:
                    is_drawn = True
                    break
                slots.append([self._begin(_Run((number,), task))])
                number += 1
            if not slots:
                return
            if slots[0][0].is_done:
                done = slots[0].pop(0)
                if not slots[0]:
                    slots.popleft()
                yield done.result  # type: ignore[misc]
                continue
            self._begin_ahead(slots, window)
            self._dispatch()
            self._wait(slots)

    def drain(self, timeout_s: float) -> Iterator[Any]:
        """Yield, after `run` was left, the results that it had not handed over, and those of the calls under way.

        Nothing else is begun: a task with more calls to make ends without a result, and so does one whose worker dies.
        Who asked the workers to stop gets what they have.
        """
        for slot in self._slots:
            yield from (run.result for run in slot if run.is_done and not isinstance(run.result, Divided))
        until = time.monotonic() + timeout_s
        while self._running and (left := until - time.monotonic()) > 0:
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=left)
            for reference in ready:
                call = self._running.pop(reference)
                try:
                    value = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    logger.warning("a Ray worker ended in a stop: %s", _line(error))
                    continue
                try:
                    call.run.steps.send(value if call.kept is None else (value, call.kept))  # type: ignore[union-attr]
                except StopIteration as end:
                    if not isinstance(end.value, Divided):
                        yield end.value

    def _begin(self, run: _Run[_T]) -> _Run[_T]:
        run.steps = run.task.steps()
        self._go_on(run, None)
        return run

    def _begin_ahead(self, slots: deque[list[_Run[_T]]], window: int) -> None:
        """Begin the next runs of divided tasks, so that only a bounded number of all is under way or waits."""
        left = window - sum(run.steps is not None for slot in slots for run in slot)
        for slot in slots:
            for run in slot:
                if run.steps is None and left > 0:
                    self._begin(run)
                    left -= 1

    def _go_on(self, run: _Run[Any], value: Any) -> None:
        """Send a task what its last call returned, and queue its next one."""
        assert run.steps is not None
        try:
            run.call = run.steps.send(value)
        except StopIteration as end:
            run.result, run.is_done, run.call = end.value, True, None
        else:
            heapq.heappush(self._waiting[id(self._pools[run.call.pool])], run)

    def _dispatch(self) -> None:
        for pool in self._distinct():
            waiting = self._waiting[id(pool)]
            while waiting:
                # A task that a worker died under has its next one for itself, so that it takes no other along.
                actor = pool.idle(alone=waiting[0].attempts > 0)
                if actor is None:
                    break
                self._submit(heapq.heappop(waiting), pool, actor)

    def _submit(self, run: _Run[Any], pool: ActorPool, actor: Actor) -> None:
        assert run.call is not None
        method = getattr(actor.handle, run.call.method)
        kept = None
        if run.call.keeps_last:
            reference, kept = method.options(num_returns=2).remote(*run.call.arguments)
        else:
            reference = method.remote(*run.call.arguments)
        actor.take(alone=run.attempts > 0)
        self._running[reference] = _Running(run, pool, actor, actor.handle, kept)

    def _wait(self, slots: deque[list[_Run[_T]]]) -> None:
        starting = {ref: (pool, actor) for pool in self._distinct() for ref, actor in pool.starting().items()}
        references = [*self._running, *starting]
        ready, _ = self._ray.wait(references, num_returns=1, timeout=_POLL_S) if references else ([], [])
        if ready:  # whatever else has ended meanwhile
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            if reference in starting:
                pool, actor = starting[reference]
                pool.started(actor, reference)
            else:
                self._ended(reference, slots)
        self._check()
        for pool in self._distinct():
            if not pool.has_ready and time.monotonic() - pool.last_ready > _PATIENCE_S:
                raise JobError(
                    f"no worker for {pool.purpose} has started within {_PATIENCE_S:.0f} s: the Ray cluster has no room "
                    f"for {pool.needs}; add a node, or end other jobs"
                )

    def _ended(self, reference: Any, slots: deque[list[_Run[_T]]]) -> None:
        call = self._running.pop(reference)
        if call.handle is call.actor.handle:
            call.actor.give_back()
        try:
            value = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RagkitError):
                raise cause from error
            if isinstance(error, self._ray.exceptions.RayTaskError) and not self._is_rays_own(cause):
                step = call.run.call.method if call.run.call else "?"
                raise JobError(f"a worker failed in {step!r}: {_line(cause or error)}") from error
            self._lost(call, error, slots)
            return
        run = call.run
        self._go_on(run, value if call.kept is None else (value, call.kept))
        if isinstance(run.result, Divided):
            self._replace(run, [_Run((*run.order, place), one) for place, one in enumerate(run.result.tasks)], slots)

    def _replace(self, run: _Run[_T], runs: list[_Run[_T]], slots: deque[list[_Run[_T]]]) -> None:
        """Put runs in the place of one; those that are not begun are when there is room."""
        slot = next(slot for slot in slots if any(one is run for one in slot))
        place = next(place for place, one in enumerate(slot) if one is run)
        slot[place : place + 1] = runs

    def _is_rays_own(self, cause: object) -> bool:
        return isinstance(cause, (self._ray.exceptions.RayError, ConnectionError))

    def _lost(self, lost: _Running, error: Exception, slots: deque[list[_Run[_T]]]) -> None:
        """Begin a task anew whose worker died, or whose data went with a node; or divide it; or give it up."""
        run = lost.run
        assert run.call is not None
        step = run.call.method
        dead = (self._ray.exceptions.RayActorError, self._ray.exceptions.OutOfMemoryError)
        if isinstance(error, dead) and lost.handle is lost.actor.handle:  # not replaced yet for another of its calls
            self._deaths += 1
            lost.pool.replace(lost.actor)
        run.attempts += 1
        parts = run.task.parts()
        logger.warning("a Ray worker was lost in %s (attempt %d): %s", step, run.attempts, _line(error))
        if run.attempts < (DIVISIBLE_ATTEMPTS if parts else LAST_ATTEMPTS):
            self._begin(run)
        elif parts:
            runs = [_Run((*run.order, place), part, attempts=1) for place, part in enumerate(parts)]
            self._replace(run, runs, slots)
            for one in runs:
                self._begin(one)
        else:
            # An actor that Ray's memory monitor has killed died like any other, and only its message says so.
            oom = self._ray.exceptions.OutOfMemoryError
            is_oom = isinstance(error, oom) or "running low on memory" in str(error)
            how = "ran out of memory" if is_oom else "died"
            message = f"{run.attempts} workers in a row {how} at it"
            run.result, run.is_done = run.task.failed(step, "oom" if is_oom else "crash", message), True

    def _distinct(self) -> list[ActorPool]:
        return list({id(pool): pool for pool in self._pools.values()}.values())


def _line(error: object) -> str:
    """Return the first telling line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
