"""A batch reads the chunks of its next requests ahead: in their order, within its share, with the same answers."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from prefetch_threads import running, until

from ragkit.config import BatchConfig
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_prefetch import REQUESTS_AHEAD, BatchPrefetch
from ragkit.generation.batch_request import BatchRequest
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.engine import Engine
from ragkit.generation.sampling import SamplingConfig
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_segment import KVMissError, MemorySource, MissReason, RecordReader, write_record
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.prefetch import KVPrefetcher
from ragkit.types import Prompt, Segment

PREFIX = Segment(tuple(range(10, 22)))
SAMPLING = SamplingConfig(6, ignore_stop_tokens=True)
ONE_BY_ONE = BatchConfig(200, max_running=1)


class SlowTier:
    """A tier in memory that takes a while, and notes who opens which chunk."""

    name = "slow"
    budget_bytes, bytes_used = 1 << 40, 0

    def __init__(self):
        self.records = {}
        self.opened = []
        self.error = None

    def known(self, keys):
        return {}

    @contextlib.contextmanager
    def open(self, ref, codec_id, num_layers):
        self.opened.append((ref.chunk_id, threading.current_thread().name))
        time.sleep(0.01)
        if self.error is not None:
            raise self.error
        if ref.key not in self.records:
            raise KVMissError(MissReason.ABSENT, "not here")
        yield RecordReader(MemorySource(self.records[ref.key]), ref, codec_id, num_layers)

    def save(self, chunks):
        self.records |= {chunk.ref.key: write_record(chunk) for chunk in chunks}
        return len(chunks)

    def ahead(self):
        return [chunk for chunk, thread in self.opened if thread == "ragkit-kv-prefetch"]

    def by_blends(self):
        return [chunk for chunk, thread in self.opened if thread != "ragkit-kv-prefetch"]


def prompt(*chunks, question):
    made = [Segment(tuple(random.Random(one).choices(range(3, 300), k=40)), f"chunk-{one}") for one in chunks]
    return Prompt((PREFIX, *made, Segment((41, 42, 50 + question))))


class Bench:
    """Requests over a slow tier that has all of their chunks: the first one without any, so that there is time."""

    def __init__(self, engine, memory_chunks=100):
        self.engine, self.tier = engine, SlowTier()
        decoder = engine.decoder
        codec = make_codec("fp32", decoder.layout)
        recipe = KVRecipe("0" * 64, decoder.config, "tiny", decoder.dtype, codec.codec_id)
        chunks = ChunkPrefill(decoder, engine.rotary, recipe, PREFIX.token_ids)
        self.prompts = [prompt(index, 5 + index % 2, 7 + index, question=index) for index in range(4)]
        with KVStore(codec, MemoryTier("ram", 1 << 30, make_policy("lru")), [self.tier]) as store:
            refs = BlendPrefill(store, chunks).chunk_refs
            wanted = [ref for one in self.prompts for ref in refs(one)]
            with store.fetch(wanted, chunks.compute) as fetched:
                self.one = fetched.chunks[0].nbytes
        self.refs = list(dict.fromkeys(wanted))
        self.tier.opened.clear()
        memory = MemoryTier("ram", memory_chunks * self.one, make_policy("lru"))
        self.store = KVStore(codec, memory, [self.tier])
        self.blend = BlendPrefill(self.store, chunks, BlendOptions(0.3))

    def requests(self):
        first = BatchRequest("first", Prompt((PREFIX, Segment(tuple(range(60, 90))))), SAMPLING)
        return [
            first,
            *(BatchRequest(str(index), one, SAMPLING, self.blend, 0.3) for index, one in enumerate(self.prompts)),
        ]

    def run(self, condition=lambda: True, config=ONE_BY_ONE):
        """Run the batch, waiting for `condition` once the first request has ended; return the results by name."""
        results = {}
        for result in BatchEngine(self.engine, config).run(self.requests()):
            if not results:
                assert result.request_id == "first"
                assert until(condition)
            assert result.error is None
            results[result.request_id] = result
        return results


@pytest.fixture
def engine(tiny_folder):
    return Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 80)


@pytest.fixture
def bench(engine):
    bench = Bench(engine)
    yield bench
    bench.store.close()


def test_blends_find_the_chunks_of_a_slow_tier_in_memory_and_answer_the_same(bench, monkeypatch):
    ahead = bench.run(lambda: not bench.store.missing(bench.refs))
    assert bench.tier.by_blends() == []
    assert len(bench.tier.ahead()) == len(bench.refs) == 10
    assert bench.store.stats.prefetched == 10
    monkeypatch.setattr(BatchPrefetch, "look", lambda *_: None)
    bench.store.discard([ref.key for ref in bench.refs])
    bench.tier.opened.clear()
    behind = bench.run()
    assert len(bench.tier.by_blends()) == 10
    for name, result in behind.items():
        assert ahead[name].finished.token_ids == result.finished.token_ids
        assert ahead[name].finished.usage == result.finished.usage
        assert ahead[name].finished.warnings == result.finished.warnings == ()
    assert running() == []


def test_chunks_are_read_in_the_order_in_which_requests_are_let_in(bench, monkeypatch):
    one_thread = partial(BatchPrefetch, partial(KVPrefetcher, threads=1))
    monkeypatch.setattr("ragkit.generation.batch_run.BatchPrefetch", one_thread)
    bench.run(lambda: not bench.store.missing(bench.refs))
    assert bench.tier.ahead() == [ref.chunk_id for ref in bench.refs]


def test_what_is_read_ahead_takes_a_quarter_of_the_memory(engine):
    bench = Bench(engine, memory_chunks=12)
    memory = bench.store.memory
    bench.run(lambda: memory.bytes_used == 3 * bench.one and not time.sleep(0.1))
    assert bench.tier.ahead()[:1] == [bench.refs[0].chunk_id]
    assert {ref.chunk_id for ref in bench.refs[:3]} <= set(bench.tier.ahead())
    assert memory.bytes_used <= 12 * bench.one
    assert all(held.pins == 0 for held in memory._held.values())
    bench.store.close()


def test_errors_of_reading_ahead_are_silent_and_the_blend_meets_them(bench):
    bench.tier.error = KVMissError(MissReason.UNREADABLE, "the cable is out")
    results = bench.run(lambda: len(bench.tier.ahead()) == 10)
    finished = [results[str(index)].finished for index in range(4)]
    assert [one.kv.misses for one in finished] == [3, 3, 2, 2]  # each chunk once, then it is in memory
    assert all(len(one.warnings) == 1 and "the cable is out" in one.warnings[0] for one in finished)
    assert "3 chunks" in finished[0].warnings[0]
    assert bench.store.stats.prefetched == 0


@pytest.mark.parametrize("memory_chunks", [0, 2, 8, 100])
def test_neither_little_memory_nor_damage_changes_an_answer(engine, memory_chunks):
    bench = Bench(engine, memory_chunks)
    alone = {one.request_id: list(engine.generate(one.prompt, SAMPLING, one.strategy, one.ratio))[-1].token_ids
             for one in bench.requests()}  # fmt: skip
    for key in list(bench.tier.records)[::3]:
        bench.tier.records[key] = bench.tier.records[key][:-5000] + bytes(5000)
    bench.store.discard([ref.key for ref in bench.refs])
    again = [replace(one, request_id=f"{one.request_id} {turn}") for turn in range(4) for one in bench.requests()]
    results = list(BatchEngine(engine, BatchConfig(200, max_running=2)).run(again))
    assert len(results) == 20
    for result in results:
        assert result.error is None
        assert result.finished.token_ids == alone[result.request_id.split()[0]]
    assert bench.store.memory.bytes_used <= memory_chunks * bench.one
    assert all(held.pins == 0 for held in bench.store.memory._held.values())
    bench.store.close()


def test_a_batch_that_is_stopped_ends_the_threads(bench):
    running_batch = BatchEngine(bench.engine, ONE_BY_ONE).run(bench.requests())
    next(running_batch)
    assert len(running()) == 2
    running_batch.close()
    assert running() == []
    assert all(held.pins == 0 for held in bench.store.memory._held.values())
    assert bench.engine.pool.num_free == bench.engine.pool.num_blocks


def test_a_batch_without_blends_or_without_slow_tiers_begins_no_thread(bench):
    begun = []
    start = threading.Thread.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (begun.append(self.name), start(self)))
        for _ in BatchEngine(bench.engine, ONE_BY_ONE).run(bench.requests()[:1] * 3):
            pass
        bench.store.backing = ()
        bench.run()
    assert "ragkit-kv-prefetch" not in begun


class Reader:
    """Notes what it is asked for."""

    def __init__(self, store, budget):
        self.store, self.budget = store, budget
        self.wanted = []
        self.is_closed = False

    def want(self, refs, kept=()):
        self.wanted.append((list(refs), list(kept)))

    def close(self):
        self.is_closed = True


class Reusing:
    """A strategy whose prompts are the names of their chunks."""

    def __init__(self, budget=1000):
        self.kv_store = SimpleNamespace(memory=SimpleNamespace(budget_bytes=budget), backing=(SlowTier(),))
        self.kv_store = type("Store", (), vars(self.kv_store))()
        self.asked = 0

    def chunk_refs(self, prompt):
        self.asked += 1
        return list(prompt)


def job(prompt, strategy):
    return type("Job", (), {"prompt": prompt, "strategy": strategy})()


def looked(*looks):
    made = []

    def reader(store, budget):
        made.append(Reader(store, budget))
        return made[-1]

    prefetch = BatchPrefetch(reader)
    for starting, coming in looks:
        prefetch.look(starting, coming)
    prefetch.close()
    assert all(one.is_closed for one in made)
    return made


def test_the_first_requests_that_wait_are_read_and_those_that_start_are_kept():
    strategy = Reusing()
    jobs = [job(f"{letter}{letter.upper()}", strategy) for letter in "abc"]
    full = job("xy", None)
    [reader] = looked(([], [jobs[0], full, jobs[1]]), ([jobs[0]], [full, jobs[1], jobs[2]]))
    assert reader.wanted == [(list("aAbB"), []), (list("bBcC"), list("aA"))]
    assert reader.budget == 250
    assert strategy.asked == 3  # once a request


def test_nothing_is_asked_again_while_the_order_is_the_same():
    strategy = Reusing()
    jobs = [job("a", strategy), job("b", strategy)]
    [reader] = looked(([], jobs), ([], jobs), ([], list(jobs)), ([], jobs[::-1]))
    assert reader.wanted == [(["a", "b"], []), (["b", "a"], [])]


def test_requests_far_behind_are_not_looked_at():
    strategy = Reusing()
    [reader] = looked(([], [job([index], strategy) for index in range(3 * REQUESTS_AHEAD)]))
    assert reader.wanted == [(list(range(REQUESTS_AHEAD)), [])]


def test_each_store_has_a_reader_of_its_own_and_one_without_memory_none():
    strategies = [Reusing(400), Reusing(800), Reusing(0)]
    jobs = [job(name, strategies[number]) for name, number in (("a", 0), ("b", 1), ("c", 0), ("d", 2))]
    made = looked(([], jobs), ([], jobs[1:2]))
    assert {one.budget: one.wanted for one in made} == {
        100: [(["a", "c"], []), ([], [])],
        200: [(["b"], []), (["b"], [])],
    }
