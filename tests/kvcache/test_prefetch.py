"""Chunks are read ahead in order, within a bound, by threads that end; whatever goes wrong is passed over."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import pytest
import torch
from kv_samples import LAYOUT, chunk_of, encoded_of, ref_of
from prefetch_threads import running, until

from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_segment import KVMissError, MemorySource, MissReason, RecordReader, write_record
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.page_locked import PageLockedMemory
from ragkit.kvcache.prefetch import KVPrefetcher

CODEC = make_codec("int4", LAYOUT)
REFS = [ref_of(number) for number in range(12)]  # of 20 tokens each
ONE = encoded_of(CODEC, REFS[0]).nbytes


class SlowTier:
    """A tier that has `REFS`, notes who opens which chunk in which order, and reads while `gate` is open."""

    name = "slow"
    budget_bytes = bytes_used = 0

    def __init__(self, refs=REFS):
        self.records = {ref.key: write_record(encoded_of(CODEC, ref)) for ref in refs}
        self.opened: list = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def known(self, keys):
        return {}

    @contextlib.contextmanager
    def open(self, ref, codec_id, num_layers):
        self.opened.append((ref, threading.current_thread().name))
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        if ref.key not in self.records:
            raise KVMissError(MissReason.ABSENT, "not here")
        yield RecordReader(MemorySource(self.records[ref.key]), ref, codec_id, num_layers)

    def save(self, chunks):
        return 0

    def by_requests(self):
        return [ref for ref, thread in self.opened if not thread.startswith("ragkit-kv-prefetch")]


@pytest.fixture
def tier():
    return SlowTier()


@pytest.fixture
def store(tier):
    with KVStore(CODEC, MemoryTier("ram", 8 * ONE, make_policy("lru")), [tier]) as store:
        yield store


def is_idle(reader):
    return not reader._reading


def computing(refs):
    return [chunk_of(ref) for ref in refs]


def test_what_is_wanted_is_in_memory_when_it_is_asked_for(store, tier):
    with contextlib.closing(KVPrefetcher(store, 8 * ONE)) as reader:
        reader.want(REFS[:5])
        assert until(lambda: not store.missing(REFS[:5]))
        with store.fetch(REFS[:5], computing) as got:
            assert got.report.bytes_by_tier == {"ram": 5 * ONE}
            for chunk, ref in zip(got.chunks, REFS, strict=False):
                assert torch.equal(chunk.data, encoded_of(CODEC, ref).data)
    assert tier.by_requests() == []
    assert store.stats.prefetched == 5
    assert store.stats.hits == {"ram": 5}


def test_chunks_are_read_in_the_order_of_their_use(store, tier):
    order = [REFS[index] for index in (4, 1, 7, 0, 3)]
    with contextlib.closing(KVPrefetcher(store, 8 * ONE, threads=1)) as reader:
        reader.want([*order, order[0]])
        assert until(lambda: len(tier.opened) == 5)
        assert [ref for ref, _ in tier.opened] == order


def test_no_more_bytes_are_held_than_the_bound_and_the_next_chunks_wait_for_room(store, tier):
    with contextlib.closing(KVPrefetcher(store, 3 * ONE)) as reader:
        reader.want(REFS[:6])
        assert until(lambda: len(reader._pins) == 3 and is_idle(reader))
        time.sleep(0.05)
        assert reader.bytes_held == 3 * ONE == store.memory.bytes_used
        assert set(reader._pins) == set(REFS[:3])
        reader.want(REFS[2:6])  # the first two were used
        assert until(lambda: set(reader._pins) == set(REFS[2:5]))
        assert reader.bytes_held == 3 * ONE
        assert [ref for ref, _ in tier.opened][:3] == REFS[:3]


def test_a_chunk_larger_than_the_bound_is_not_kept_and_stops_no_other(store, tier):
    large = ref_of("large", 90)
    tier.records[large.key] = write_record(encoded_of(CODEC, large))
    with contextlib.closing(KVPrefetcher(store, 2 * ONE)) as reader:
        reader.want([large, REFS[0]])
        assert until(lambda: not store.missing(REFS[:1]))
        assert store.missing([large]) == [large]
        assert reader.bytes_held == ONE


def test_a_chunk_that_is_expected_to_be_larger_than_the_bound_stops_no_other(store, tier):
    large = ref_of("large", 90)
    tier.records[large.key] = write_record(encoded_of(CODEC, large))
    with contextlib.closing(KVPrefetcher(store, 2 * ONE)) as reader:
        reader.want(REFS[:1])
        assert until(lambda: not store.missing(REFS[:1]))  # from now on it is known what a token takes
        reader.want([large, REFS[1]])
        assert until(lambda: not store.missing(REFS[1:2]))
        assert reader.bytes_held == ONE


def test_what_was_read_ahead_is_not_driven_out_before_its_use_and_may_leave_after_it(store, tier):
    with contextlib.closing(KVPrefetcher(store, 4 * ONE)) as reader:
        reader.want(REFS[:4])
        assert until(lambda: len(reader._pins) == 4)
        for number in range(20):
            store.memory.add(encoded_of(CODEC, ref_of(f"other {number}"))).release()
        assert store.missing(REFS[:4]) == []
        reader.want([], kept=REFS[:2])
        for number in range(20):
            store.memory.add(encoded_of(CODEC, ref_of(f"another {number}"))).release()
        assert store.missing(REFS[:4]) == REFS[2:4]


def test_what_requests_hold_is_not_pushed_out(store, tier):
    with store.fetch(REFS[:7], computing), contextlib.closing(KVPrefetcher(store, 8 * ONE)) as reader:
        reader.want(REFS[7:])
        assert until(lambda: len(reader._passed) + len(reader._pins) == 5)
        assert store.missing(REFS[:7]) == []
        assert reader.bytes_held == ONE


def test_what_is_in_memory_already_is_held_and_not_read(store, tier):
    store.memory.add(encoded_of(CODEC, REFS[0])).release()
    with contextlib.closing(KVPrefetcher(store, 8 * ONE)) as reader:
        reader.want(REFS[:2])
        assert until(lambda: set(reader._pins) == set(REFS[:2]))
        assert [ref for ref, _ in tier.opened] == REFS[1:2]


def test_what_is_being_fetched_now_is_not_read_again(store, tier):
    with contextlib.closing(KVPrefetcher(store, 8 * ONE)) as reader:
        reader.want(REFS[1:2], kept=REFS[:1])
        assert until(lambda: set(reader._pins) == {REFS[1]})
        assert [ref for ref, _ in tier.opened] == REFS[1:2]


def test_a_chunk_that_a_request_is_bringing_is_held_when_it_is_there(store, tier):
    tier.gate.clear()
    with contextlib.closing(KVPrefetcher(store, 8 * ONE)) as reader, contextlib.ExitStack() as stack:
        fetching = threading.Thread(target=lambda: stack.enter_context(store.fetch(REFS[:1], computing)))
        fetching.start()
        assert until(lambda: len(tier.opened) == 1)
        reader.want(REFS[:1])
        assert until(lambda: reader._passed == {REFS[0]})
        tier.gate.set()
        assert until(lambda: set(reader._pins) == {REFS[0]})
        fetching.join(10)
        assert len(tier.opened) == 1


def test_chunks_that_are_nowhere_or_cannot_be_read_are_passed_over_in_silence(store, tier, caplog):
    nowhere = ref_of("nowhere")
    with caplog.at_level(logging.INFO), contextlib.closing(KVPrefetcher(store, 8 * ONE)) as reader:
        reader.want([nowhere, REFS[0]])
        assert until(lambda: not store.missing(REFS[:1]))
        tier.error = OSError("the cable is out")
        reader.want([nowhere, *REFS[:3]])
        assert until(lambda: reader._passed == {nowhere, *REFS[1:3]})
        tier.error = None
        with store.fetch([nowhere, *REFS[:3]], computing) as got:
            assert (got.report.hits, got.report.misses, got.report.damage) == (3, 1, "")
    assert caplog.records == []
    assert store.stats.misses == {("slow", MissReason.ABSENT): 1}  # counted by the request alone


def test_stopping_ends_the_threads_and_gives_the_memory_back(store, tier):
    tier.gate.clear()
    reader = KVPrefetcher(store, 8 * ONE)
    assert running() == []
    reader.want(REFS)
    assert until(lambda: tier.opened)
    stopping = threading.Thread(target=reader.close)
    stopping.start()
    tier.gate.set()
    stopping.join(10)
    assert running() == []
    assert len(tier.opened) <= 2  # those that were being read
    assert reader.bytes_held == 0
    assert all(held.pins == 0 for held in store.memory._held.values())
    reader.want(REFS)
    reader.close()
    assert running() == []


def test_a_read_that_hangs_is_left_behind_and_keeps_nothing(store, tier, monkeypatch):
    monkeypatch.setattr("ragkit.kvcache.prefetch._LET_GO_S", 0.05)
    tier.gate.clear()
    reader = KVPrefetcher(store, 8 * ONE)
    reader.want(REFS[:1])
    assert until(lambda: tier.opened)
    reader.close()
    tier.gate.set()
    assert until(lambda: not running())
    assert reader.bytes_held == 0
    assert all(held.pins == 0 for held in store.memory._held.values())


def test_nothing_is_read_to_where_it_would_have_to_be_copied_from(tier):
    """A copy by torch would begin a team of threads in the thread that reads ahead."""
    memory = PageLockedMemory(2 * ONE, 2 * ONE, new_slab=lambda size: torch.empty(size, dtype=torch.uint8))
    slabs = [memory.allocate(2 * ONE), memory.allocate(2 * ONE)]
    tier_of_host = MemoryTier("ram", 8 * ONE, make_policy("lru"), page_locked=memory)
    with KVStore(CODEC, tier_of_host, [tier]) as store, contextlib.closing(KVPrefetcher(store, 4 * ONE)) as reader:
        reader.want(REFS[:1])
        assert until(lambda: reader._passed == {REFS[0]})
        assert store.missing(REFS[:1]) == REFS[:1]
        del slabs
        reader.want(REFS[1:2])
        assert until(lambda: not store.missing(REFS[1:2]))


def test_being_held_for_later_is_no_use_for_eviction():
    tier = MemoryTier("ram", 2 * ONE, make_policy("lru"))
    for ref in REFS[:2]:
        tier.add(encoded_of(CODEC, ref)).release()
    tier.pin(REFS[0], is_use=False).release()
    tier.add(encoded_of(CODEC, REFS[2])).release()
    assert tier.refs() == REFS[1:3]
