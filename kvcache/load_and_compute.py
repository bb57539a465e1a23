"""Loading some chunks of a request with threads while its own thread computes others.

A plan says who begins with what. Whoever is done early takes over what the other has not begun and would end later:
the plan need not be right, only about right. A load that takes longer than it should is overtaken by computing its
chunk once that has cost as much as waiting (as one rents skis until buying would have paid); so are loads that no
thread begins.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future

from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.load_controller import LoadController, StoredChunk

COMPUTED = "computed"  # the origin of what no tier had
RECOMPUTED = "recomputed"  # the origin of what a tier had, and computing gave sooner

_BATCH_S = 0.05  # of computing between two looks at what the loads have brought

Found = tuple[EncodedKV, str] | None  # a chunk and the tier that it comes from, or nothing
Load = Callable[[ChunkRef, StoredChunk | None], Found]
Compute = Callable[[Sequence[ChunkRef], str], None]
Hold = Callable[[ChunkRef, EncodedKV, str], object]


class LoadAndCompute:
    """Brings the chunks of one request. Used once.

    Without a controller everything is loaded first, and what was not found is computed then.

    Args:
        refs: the chunks, each once.
        stored: those that tiers say they have; others are looked for as well.
        load: finds a chunk in the tiers; called by several threads.
        controller: decides what is computed although it is stored.
    """

    def __init__(
        self,
        refs: Sequence[ChunkRef],
        stored: Mapping[ChunkRef, StoredChunk],
        load: Load,
        controller: LoadController | None,
    ) -> None:
        self._stored = stored
        self._load = load
        self._controller = controller
        self._condition = threading.Condition()
        self._open = dict.fromkeys(refs)  # neither brought nor being computed
        planned, declined = list(stored), []
        if controller is not None:
            plan = controller.plan(list(stored.values()))
            planned, declined = [chunk.ref for chunk in plan.load], [chunk.ref for chunk in plan.compute]
        # What may be nowhere is looked for first, so that computing it can begin.
        self._loads = deque([*(ref for ref in refs if ref not in stored), *planned])
        self._declined = deque(declined)
        self._missed: deque[ChunkRef] = deque()
        self._loading: dict[ChunkRef, float] = {}  # since when
        self._ready: list[tuple[ChunkRef, EncodedKV, str]] = []
        self._workers = 0
        self._error: Exception | None = None
        self._ended = False
        self.loads_ended = time.perf_counter()

    def start(self, executor: Executor, threads: int) -> None:
        """Have up to `threads` of the executor's threads load."""
        count = min(threads, len(self._loads) + len(self._declined))
        self._workers = count
        for begun in range(count):
            try:
                worker = executor.submit(self._work)
            except RuntimeError:  # the store was closed: `run` says so if it lacks what was to be loaded
                with self._condition:
                    self._workers -= count - begun
                return
            worker.add_done_callback(self._worker_is_done)

    def run(self, compute: Compute, hold: Hold) -> None:
        """Bring everything: `compute` is given chunks with their origin, `hold` gets what was loaded.

        Raises:
            KVCacheError: the store was closed meanwhile.
        """
        try:
            while True:
                ready, batch, origin = self._next()
                for ref, encoded, tier in ready:
                    hold(ref, encoded, tier)
                if batch:
                    compute(batch, origin)
                elif not ready:
                    return
        finally:
            with self._condition:
                self._ended = True

    def _next(self) -> tuple[list[tuple[ChunkRef, EncodedKV, str]], list[ChunkRef], str]:
        """Wait for something to do: what was loaded, and what to compute now. Both are empty at the end."""
        with self._condition:
            while True:
                if self._error is not None:
                    raise self._error
                ready = [one for one in self._ready if one[0] in self._open]  # others were overtaken
                self._ready = []
                for ref, _, _ in ready:
                    del self._open[ref]
                batch, origin = self._to_compute()
                for ref in batch:
                    del self._open[ref]
                if ready or batch or not self._open:
                    return ready, batch, origin
                if self._loads and not self._workers:
                    raise KVCacheError("the KV store was closed while a request was loading from it")
                self._condition.wait(self._patience())

    def _to_compute(self) -> tuple[list[ChunkRef], str]:
        controller = self._controller
        if controller is None:
            everything_tried = not self._loads and not self._loading
            return (self._drain(self._missed) if everything_tried else []), COMPUTED
        if self._missed:
            return self._drain(self._missed, controller), COMPUTED
        if self._declined:
            return self._drain(self._declined, controller), RECOMPUTED
        ref = self._taken_from_loads(controller) or self._overtaken(controller)
        return ([] if ref is None else [ref]), (RECOMPUTED if ref in self._stored else COMPUTED)

    def _drain(self, queue: deque[ChunkRef], controller: LoadController | None = None) -> list[ChunkRef]:
        """Take from the front: all, or what is computed in one go."""
        batch: list[ChunkRef] = []
        while queue and (controller is None or not batch or self._compute_s(controller, *batch) < _BATCH_S):
            batch.append(queue.popleft())
        return batch

    def _taken_from_loads(self, controller: LoadController) -> ChunkRef | None:
        """Return the last chunk that waits to be loaded, if it is computed sooner, or if nobody begins to load."""
        if not self._loads:
            return None
        sooner = self._compute_s(controller, self._loads[-1]) < self._load_s(controller, *self._loads, *self._loading)
        return self._loads.pop() if sooner or time.perf_counter() >= self._given_up_at(controller) else None

    def _given_up_at(self, controller: LoadController) -> float:
        """Return when loads that wait count as late: those of other requests may hang, and have all the threads."""
        if not self._loads or self._loading:
            return math.inf
        return self.loads_ended + self._load_s(controller, *self._loads) + self._compute_s(controller, self._loads[-1])

    def _overtaken(self, controller: LoadController) -> ChunkRef | None:
        """Return a chunk that is being loaded and is better computed: by what is expected, or because it is late."""
        now, expected_s = time.perf_counter(), self._load_s(controller, *self._loading)
        for ref, started in self._loading.items():
            if ref in self._open:
                compute_s, left_s = self._compute_s(controller, ref), started + expected_s - now
                if left_s > compute_s or left_s < -compute_s:
                    return ref
        return None

    def _patience(self) -> float | None:
        """Return for how many seconds nothing but a load can bring news."""
        controller = self._controller
        if controller is None:
            return None
        awaited = [(ref, started) for ref, started in self._loading.items() if ref in self._open]
        expected_s = self._load_s(controller, *self._loading)
        ends = [started + expected_s + self._compute_s(controller, ref) for ref, started in awaited]
        late = min([*ends, self._given_up_at(controller)])
        return None if late == math.inf else max(late - time.perf_counter(), 1e-3)

    def _load_s(self, controller: LoadController, *refs: ChunkRef) -> float:
        return controller.load_seconds([self._stored[ref] for ref in refs if ref in self._stored])

    def _compute_s(self, controller: LoadController, *refs: ChunkRef) -> float:
        return controller.compute_seconds([len(ref.token_ids) for ref in refs])

    def _work(self) -> None:
        """Load one chunk after the other; run by the loading threads."""
        while (ref := self._next_load()) is not None:
            found: Found = None
            error: Exception | None = None
            try:
                found = self._load(ref, self._stored.get(ref))
            except Exception as failure:  # raised where the request is
                error = failure
            with self._condition:
                del self._loading[ref]
                self.loads_ended = time.perf_counter()
                if error is not None:
                    self._error = error
                elif found is not None:
                    self._ready.append((ref, *found))
                elif ref in self._open:
                    self._missed.append(ref)
                self._condition.notify_all()

    def _next_load(self) -> ChunkRef | None:
        with self._condition:
            if self._ended or self._error is not None:
                return None
            if self._loads:
                ref = self._loads.popleft()
            elif self._declined and self._is_loaded_sooner(self._declined[-1]):
                ref = self._declined.pop()
            else:
                return None
            self._loading[ref] = time.perf_counter()
            return ref

    def _is_loaded_sooner(self, ref: ChunkRef) -> bool:
        """Return whether the chunk that would be computed last is here sooner if it is loaded now."""
        controller = self._controller
        if controller is None:
            return True
        computing_s = self._compute_s(controller, *self._missed, *self._declined)
        return self._load_s(controller, ref, *self._loading) < computing_s

    def _worker_is_done(self, _: Future[None]) -> None:
        with self._condition:
            self._workers -= 1
            self._condition.notify_all()
