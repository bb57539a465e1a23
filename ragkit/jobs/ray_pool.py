"""A pool of equal Ray actors: those that die are replaced, those that start are asked who they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ragkit.errors import JobError, RagkitError

_QUEUED = 2  # calls that a worker has at most: the one at hand, and the next, so that it never waits for the driver
_FAILED_STARTS = 3  # in a row
_CONTROL = "control"  # calls of this group have a thread of their own


@dataclass(slots=True)
class Actor:
    """One place of a pool; `handle` is Ray's, and another one when the worker was replaced."""

    handle: Any = None
    is_ready: bool = False
    calls: int = 0
    is_reserved: bool = False

    def take(self, *, alone: bool) -> None:
        """Count a call that it was given; one that is to be alone keeps others away."""
        self.calls += 1
        self.is_reserved = alone

    def give_back(self) -> None:
        """Count a call that has ended."""
        self.calls -= 1
        self.is_reserved = False


class ActorPool:
    """Actors of one class and equal resources.

    Args:
        ray: the module.
        purpose: what they do, for messages.
        size: how many.
        worker: the class.
        arguments: its constructor's.
        options: their resources, as Ray's `options` takes them.
        check: is given what a worker's `start` returned, and raises where it is no use.
        hears: their method `stop` can be called while another one runs (`ask_to_stop`).
    """

    def __init__(
        self,
        ray: ModuleType,
        purpose: str,
        size: int,
        worker: type,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        check: Callable[[Any], None],
        *,
        hears: bool = False,
    ) -> None:
        self._ray = ray
        self.purpose = purpose
        self.size = size
        self.last_ready = time.monotonic()
        self.first_ready = 0.0  # monotonic time; 0 while none was
        remote = ray.remote(concurrency_groups={_CONTROL: 1})(worker) if hears else ray.remote(worker)
        self._class = remote.options(max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", **options)
        self._arguments = arguments
        self._options = dict(options)
        self._check = check
        self._failed_starts = 0
        self._starting: dict[Any, Actor] = {}
        self._actors: list[Actor] = []
        for _ in range(size):
            self._actors.append(Actor())
        for actor in self._actors:
            self.replace(actor)

    @property
    def needs(self) -> str:
        """What one worker takes, in words."""
        return ", ".join(f"{name.removeprefix('num_')} {amount:g}" for name, amount in self._options.items())

    @property
    def has_ready(self) -> bool:
        """Whether a worker is ready."""
        if any(actor.is_ready for actor in self._actors):
            self.last_ready = time.monotonic()
            return True
        return False

    def idle(self, *, alone: bool) -> Actor | None:
        """Return the worker with the least to do that can take a call; for one `alone`, one that has nothing to do."""
        most = 1 if alone else _QUEUED
        able = [actor for actor in self._actors if actor.is_ready and actor.calls < most and not actor.is_reserved]
        return min(able, key=lambda actor: actor.calls, default=None)

    def starting(self) -> Mapping[Any, Actor]:
        """Return the workers that start, by the reference that says when they are ready."""
        return self._starting

    def started(self, actor: Actor, reference: Any) -> None:
        """Take note of a worker that is ready, or start another where it has failed.

        Raises:
            RagkitError: what keeps it from working would keep every other.
        """
        if self._starting.pop(reference, None) is None:
            return
        try:
            self._check(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, RagkitError):
                raise cause from error
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                reason = " ".join(str(error).split())[-400:]
                raise JobError(
                    f"{self._failed_starts} workers for {self.purpose} could not start, the last because: {reason}; "
                    "the same ragkit must be installed on every node"
                ) from error
            self.replace(actor)
        else:
            self._failed_starts = 0
            actor.is_ready = True
            self.last_ready = time.monotonic()
            self.first_ready = self.first_ready or self.last_ready

    def replace(self, actor: Actor) -> None:
        """Start a worker, in place of the one that was there."""
        self._kill(actor)
        actor.handle = self._class.remote(*self._arguments)
        actor.is_ready, actor.is_reserved, actor.calls = False, False, 0
        self._starting[actor.handle.start.remote()] = actor

    def ask_to_stop(self) -> None:
        """Call `stop` of every worker that is ready, whatever else it does."""
        for actor in self._actors:
            if actor.is_ready:
                actor.handle.stop.options(concurrency_group=_CONTROL).remote()

    def close(self) -> None:
        """End the workers."""
        for actor in self._actors:
            self._kill(actor)
        self._actors.clear()
        self._starting.clear()

    def _kill(self, actor: Actor) -> None:
        if actor.handle is not None:
            self._ray.kill(actor.handle)
            actor.handle = None
