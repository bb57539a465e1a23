import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from kv_samples import LAYOUT, encoded_of, ref_of

from ragkit.errors import KVCacheError
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.cost_model import Cost
from ragkit.kvcache.load_and_compute import COMPUTED, RECOMPUTED, LoadAndCompute
from ragkit.kvcache.load_controller import LoadController, LoadPlan, StoredChunk

CODEC = make_codec("bf16", LAYOUT)
REFS = [ref_of(number) for number in range(8)]
STORED = {ref: StoredChunk(ref, "disk", 10**6) for ref in REFS}


class Planned(LoadController):
    """Plans to load the first `loads` chunks, and expects a load and a pass to take so many seconds."""

    def __init__(self, loads, load_s, compute_s):
        super().__init__(Cost(compute_s, 0.0))
        self.loads, self.load_s = loads, load_s

    def plan(self, stored, lacking_tokens=()):
        return LoadPlan(tuple(stored[: self.loads]), tuple(stored[self.loads :]), 0.0)

    def load_seconds(self, chunks):
        return self.load_s * len(chunks)


class Request:
    """Runs one, and notes what came from where."""

    def __init__(self, controller, load, stored=STORED, refs=REFS, compute_takes=0.0, threads=2):
        self.origins, self.loaded, self.order = {}, [], []
        self.load, self.compute_takes = load, compute_takes
        self.bringing = LoadAndCompute(refs, stored, self.load_one, controller)
        with ThreadPoolExecutor(threads) as executor:
            self.bringing.start(executor, threads)
            started = time.perf_counter()
            self.bringing.run(self.compute, self.hold)
            self.spent = time.perf_counter() - started

    def load_one(self, ref, expected):
        self.loaded.append(ref)
        assert expected == STORED.get(ref) or expected is None
        return (encoded_of(CODEC, ref), "disk") if self.load(ref) else None

    def compute(self, refs, origin):
        time.sleep(self.compute_takes * len(refs))
        for ref in refs:
            assert ref not in self.origins
            self.origins[ref] = origin
            self.order.append(ref)

    def hold(self, ref, encoded, tier):
        assert encoded.ref == ref
        assert ref not in self.origins
        self.origins[ref] = tier

    def refs_from(self, origin):
        return [ref for ref in REFS if self.origins.get(ref) == origin]


def test_a_plan_that_is_right_is_followed():
    begun = threading.Event()

    def load(ref):
        begun.wait(5)
        return True

    class Timed(Request):
        def compute(self, refs, origin):
            super().compute(refs, origin)
            if len(self.order) == 5:
                begun.set()

    request = Timed(Planned(3, load_s=0.05, compute_s=0.2), load, compute_takes=0.001, threads=3)
    assert request.refs_from("disk") == REFS[:3]
    assert request.refs_from(RECOMPUTED) == request.order == REFS[3:]


def test_what_is_nowhere_is_computed_and_what_is_only_said_to_be_there_is_a_miss():
    request = Request(Planned(8, load_s=1e-3, compute_s=10.0), lambda ref: ref in REFS[4:])
    assert request.refs_from(COMPUTED) == REFS[:4]
    assert request.refs_from("disk") == REFS[4:]


def test_without_a_controller_all_is_loaded_and_the_rest_computed_then():
    looked_at, batches = [], []

    class Noted(Request):
        def compute(self, refs, origin):
            super().compute(refs, origin)
            batches.append(refs)

    def load(ref):
        time.sleep(0.01)
        looked_at.append(ref)
        return ref in REFS[2:]

    request = Noted(None, load, stored={})
    assert len(batches) == 1
    assert sorted(ref.key for ref in looked_at) == sorted(ref.key for ref in REFS)
    assert request.refs_from(COMPUTED) == REFS[:2]
    assert request.refs_from("disk") == REFS[2:]


@pytest.mark.parametrize("stored", [STORED, {}], ids=["stored", "nowhere"])
def test_computing_takes_over_where_loads_of_others_hang_in_every_thread(stored):
    free, ended = threading.Event(), threading.Event()
    computed = []
    bringing = LoadAndCompute(REFS, stored, lambda ref, expected: None, Planned(8, load_s=1e-3, compute_s=0.02))
    executor = ThreadPoolExecutor(1)
    executor.submit(free.wait, 20)

    def run():
        bringing.start(executor, 1)
        bringing.run(lambda refs, origin: computed.extend(refs), lambda *found: None)
        ended.set()

    request = threading.Thread(target=run)
    request.start()
    try:
        assert ended.wait(5)
        assert computed == REFS[::-1]
    finally:
        free.set()
        request.join()
        executor.shutdown()


def test_computing_takes_over_what_a_hanging_tier_has_not_brought():
    free = threading.Event()
    threading.Timer(1.0, free.set).start()
    request = Request(Planned(8, load_s=0.02, compute_s=0.01), lambda ref: free.wait(10))
    assert request.refs_from(RECOMPUTED) == REFS
    assert request.spent < 0.9
    assert len(request.loaded) == 2  # one a thread, and both came too late
    # From the end, since loading begins at the front; what had begun last of all.
    assert request.order[:6] == REFS[:1:-1]


def test_loading_takes_over_what_computing_has_not_begun():
    request = Request(Planned(0, load_s=1e-3, compute_s=0.06), lambda ref: True, compute_takes=0.2)
    assert len(request.refs_from(RECOMPUTED)) <= 2
    assert request.refs_from("disk")[-1] == REFS[-1]
    assert request.spent < 1.0


def test_a_load_that_ends_in_time_is_not_overtaken():
    def load(ref):
        time.sleep(0.05)
        return True

    request = Request(Planned(8, load_s=0.02, compute_s=0.4), load)
    assert request.refs_from("disk") == REFS


def test_an_unlikely_load_is_overtaken_at_once():
    free = threading.Event()
    threading.Timer(1.0, free.set).start()
    request = Request(Planned(1, load_s=60.0, compute_s=0.01), lambda ref: free.wait(10))
    assert request.refs_from(RECOMPUTED) == REFS
    assert request.spent < 0.9


def test_an_error_while_loading_ends_the_request():
    def load(ref):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        Request(Planned(8, load_s=1e-3, compute_s=1.0), load)


def test_threads_that_are_gone_are_an_error_and_no_wait_for_ever():
    executor = ThreadPoolExecutor(1)
    gate = threading.Event()
    executor.submit(gate.wait, 10)
    bringing = LoadAndCompute(REFS, STORED, lambda ref, expected: None, None)
    bringing.start(executor, 1)
    executor.shutdown(wait=False, cancel_futures=True)
    gate.set()
    with pytest.raises(KVCacheError, match="closed while a request was loading"):
        bringing.run(lambda refs, origin: None, lambda ref, encoded, tier: None)
