import dataclasses
import logging
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kv_samples import LAYOUT, chunk_of, encoded_of, key_of, ref_of, store_of

from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import EncodedKV
from ragkit.kvcache.codec import decode_chunk
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.cost_model import Cost
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_segment import MissReason
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.load_controller import COMPUTING, LoadController, LoadPlan
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.pool_tier import PinnedBlocks, PoolTier
from ragkit.kvcache.remote_tier import RemoteTier
from ragkit.kvcache.segment_tier import SegmentTier

CODEC = make_codec("int4", LAYOUT)


class Deciding(LoadController):
    """Has the chunks that `declines` names computed, and expects loading to be done in no time otherwise."""

    def __init__(self, declines):
        super().__init__(Cost(1e-3, 0.0))
        self.declines = declines

    def plan(self, stored, lacking_tokens=()):
        declined = tuple(chunk for chunk in stored if self.declines(chunk))
        return LoadPlan(tuple(chunk for chunk in stored if chunk not in declined), declined, 0.0)

    def load_seconds(self, chunks):
        return sum(10.0 if self.declines(chunk) else 0.0 for chunk in chunks)

    def compute_seconds(self, tokens):
        return 1.0 * len(tokens)


class Computer:
    """Computes chunk KV, and counts what it computed."""

    def __init__(self):
        self.computed = []
        self.gate = None

    def __call__(self, refs):
        if self.gate is not None:
            self.gate.wait(10)
        self.computed += refs
        return [chunk_of(ref) for ref in refs]


@pytest.fixture
def compute():
    return Computer()


@pytest.fixture
def place(tmp_path):
    store, chunk_ids = store_of(tmp_path / "store")
    with store:
        yield store, chunk_ids


def kv_store(store=None, budget=10**8, disk=10**9, codec=CODEC, **options):
    backing = [] if store is None else [SegmentTier(store, disk, make_policy("cost"))]
    return KVStore(codec, MemoryTier("ram", budget, make_policy("cost")), backing, **options)


def is_right(chunk, ref, codec=CODEC):
    """Whether the numbers are those of a chunk that was computed just now."""
    got, fresh = decode_chunk(codec, chunk), decode_chunk(codec, encoded_of(codec, ref))
    return got.token_ids == ref.token_ids and all(
        torch.equal(a, b)
        for mine, theirs in zip(got.layers, fresh.layers, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )


def refs_of(chunk_ids, count):
    return [ref_of(number, 10 + number, chunk_ids[number]) for number in range(count)]


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4", "entropy2"])
def test_hit_and_miss_see_equal_numbers(place, compute, name):
    store, ids = place
    codec, refs = make_codec(name, LAYOUT), refs_of(ids, 3)
    with kv_store(store, codec=codec) as kv:
        with kv.fetch(refs, compute) as missed:
            first = [kv.decode(chunk) for chunk in missed.chunks]
        with kv.fetch(refs, compute) as hit:
            second = [kv.decode(chunk) for chunk in hit.chunks]
    with kv_store(store, codec=codec) as kv, kv.fetch(refs, compute) as loaded:
        third = [kv.decode(chunk) for chunk in loaded.chunks]
    assert len(compute.computed) == 3
    for a, b, c in zip(first, second, third, strict=True):
        for x, y, z in zip(a.layers, b.layers, c.layers, strict=True):
            assert torch.equal(x[0], y[0])
            assert torch.equal(x[0], z[0])
            assert torch.equal(x[1], z[1])


def test_the_report_says_where_chunks_came_from(place, compute):
    store, ids = place
    refs = refs_of(ids, 4)
    with kv_store(store) as kv, kv.fetch(refs[:2], compute) as got:
        assert (got.report.hits, got.report.misses, got.report.bytes_by_tier) == (0, 2, {})
    with kv_store(store) as kv:
        with kv.fetch(refs[:1], compute):
            pass
        with kv.fetch(refs[:3], compute) as got:
            sizes = [chunk.nbytes for chunk in got.chunks]
            assert (got.report.hits, got.report.misses) == (2, 1)
            assert got.report.bytes_by_tier == {"ram": sizes[0], "disk": sizes[1]}
            assert got.report.load_ms > 0
            assert got.report.compute_ms > 0
        assert kv.stats.hits == {"disk": 2, "ram": 1}
        assert kv.stats.misses == {("disk", MissReason.ABSENT): 1}
        assert kv.stats.computed == 1
        kv.flush()
        assert kv.stats.saved == {"disk": 1}
        assert kv.bytes_by_tier() == {"ram": sum(sizes), "disk": kv.backing[0].bytes_used}


def test_a_chunk_that_stands_twice_is_computed_once(compute):
    ref = ref_of("a")
    with kv_store() as kv, kv.fetch([ref, ref_of("b"), ref], compute) as got:
        assert [chunk.ref for chunk in got.chunks] == [ref, ref_of("b"), ref]
        assert len(compute.computed) == 2


def test_chunks_in_use_stay_and_leave_afterwards(compute):
    with kv_store(budget=encoded_of(CODEC, ref_of("a")).nbytes) as kv:
        with kv.fetch([ref_of("a")], compute):
            with kv.fetch([ref_of("b")], compute) as other:
                assert is_right(other.chunks[0], ref_of("b"))
            assert kv.memory.holds(ref_of("a"))
        with kv.fetch([ref_of("b")], compute):
            assert not kv.memory.holds(ref_of("a"))


def test_nothing_stays_pinned_after_an_error(compute):
    def fail(refs):
        raise RuntimeError("out of memory")

    with kv_store() as kv:
        with kv.fetch([ref_of("a")], compute):
            pass
        with pytest.raises(RuntimeError, match="out of memory"), kv.fetch([ref_of("a"), ref_of("b")], fail):
            pass
        assert [held.pins for held in kv.memory._held.values()] == [0]
        with kv.fetch([ref_of("b")], compute) as got:  # nobody waits for what failed
            assert is_right(got.chunks[0], ref_of("b"))


def test_nobody_waits_for_a_request_that_was_interrupted_while_it_looked(compute, monkeypatch):
    def interrupted(ref):
        if ref == ref_of("b"):
            raise KeyboardInterrupt
        return None

    with kv_store() as kv, ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as patched:
            patched.setattr(kv.memory, "pin", interrupted)
            with pytest.raises(KeyboardInterrupt), kv.fetch([ref_of("a"), ref_of("b")], compute):
                pass

        def ask():
            with kv.fetch([ref_of("a")], compute) as got:
                return is_right(got.chunks[0], ref_of("a"))

        asked = pool.submit(ask)
        try:
            assert asked.result(5)
        finally:
            for future in list(kv._in_flight.values()):  # so that a failing test ends
                future.cancel()
                kv._in_flight.clear()


def test_two_requests_compute_a_chunk_once(compute):
    compute.gate = threading.Event()
    with kv_store() as kv, ThreadPoolExecutor(4) as pool:

        def ask(refs):
            with kv.fetch(refs, compute) as got:
                return [is_right(chunk, ref) for chunk, ref in zip(got.chunks, refs, strict=True)]

        a, b = ref_of("a"), ref_of("b")
        asked = [pool.submit(ask, refs) for refs in ([a, b], [b, a], [a], [b])]
        time.sleep(0.1)
        compute.gate.set()
        assert all(all(future.result(20)) for future in asked)
    assert sorted(ref.key for ref in compute.computed) == sorted([a.key, b.key])


def test_who_waits_for_a_request_that_fails_computes_itself(compute):
    started, go_on = threading.Event(), threading.Event()

    def fail(refs):
        started.set()
        go_on.wait(10)
        raise RuntimeError("killed")

    def failing():
        with kv.fetch([ref_of("a")], fail):
            pass

    with kv_store() as kv, ThreadPoolExecutor(1) as pool:
        future = pool.submit(failing)
        started.wait(10)
        threading.Timer(0.1, go_on.set).start()
        with kv.fetch([ref_of("a")], compute) as got:
            assert is_right(got.chunks[0], ref_of("a"))
        with pytest.raises(RuntimeError, match="killed"):
            future.result(10)


def test_computing_the_wrong_chunk_is_an_error():
    with kv_store() as kv:
        wrong = lambda refs: [chunk_of(ref_of("b"))]  # noqa: E731
        with pytest.raises(KVCacheError, match="was asked for"), kv.fetch([ref_of("a")], wrong):
            pass
        with (
            pytest.raises(KVCacheError, match="1 chunks were to be computed, 0 came back"),
            kv.fetch([ref_of("a")], lambda refs: []),
        ):
            pass


def test_prefetched_chunks_are_in_memory_when_they_are_asked_for(place, compute):
    store, ids = place
    refs = refs_of(ids, 6)
    with kv_store(store) as kv, kv.fetch(refs, compute):
        pass
    with kv_store(store) as kv:
        kv.prefetch([*refs, ref_of("nowhere")])
        for _ in range(500):
            if not kv.missing(refs):
                break
            time.sleep(0.01)
        with kv.fetch(refs, compute) as got:
            assert got.report.bytes_by_tier.keys() == {"ram"}
        assert kv.stats.prefetched == 6
        assert kv.missing([ref_of("nowhere")]) == [ref_of("nowhere")]
    kv.prefetch(refs)  # harmless after the end


def test_asking_during_a_prefetch_waits_for_it(place, compute):
    store, ids = place
    refs = refs_of(ids, 6)
    with kv_store(store) as kv, kv.fetch(refs, compute):
        pass
    with kv_store(store) as kv:
        kv.prefetch(refs)
        with kv.fetch(refs, compute) as got:
            assert all(is_right(chunk, ref) for chunk, ref in zip(got.chunks, refs, strict=True))
    assert len(compute.computed) == 6


def test_the_next_tier_is_asked_and_every_tier_is_filled(place, tmp_path, compute):
    store, ids = place
    refs = refs_of(ids, 3)
    remote = RemoteTier(f"file://{tmp_path}/remote", 10**9, make_policy("lru"))
    disk = SegmentTier(store, 10**9, make_policy("lru"))
    with KVStore(CODEC, MemoryTier("ram", 10**8, make_policy("lru")), [disk, remote]) as kv:
        with kv.fetch(refs, compute):
            pass
        kv.flush()
        assert kv.stats.saved == {"disk": 3, "file": 3}
    with store.writer() as writer:
        writer.remove_kv([ref.key.digest for ref in refs])
    memory = MemoryTier("ram", 10**8, make_policy("lru"))
    with KVStore(CODEC, memory, [disk, remote]) as kv, kv.fetch(refs, compute) as got:
        assert got.report.bytes_by_tier.keys() == {"file"}
    assert len(compute.computed) == 3


def test_a_tier_that_cannot_be_written_is_counted_and_logged(place, compute, monkeypatch, caplog):
    store, ids = place
    monkeypatch.setattr("ragkit.kvcache.segment_tier._LOCK_TIMEOUT_S", 0.05)
    with store.writer(), kv_store(store) as kv:
        with kv.fetch(refs_of(ids, 2), compute):
            pass
        kv.flush()
        assert kv.stats.not_saved == {"disk": 2}
    assert "stay in memory only: chunk KV could not be written to the store" in caplog.text


def test_a_changed_codec_or_model_is_a_miss(place, compute):
    store, ids = place
    refs = refs_of(ids, 2)
    with kv_store(store) as kv, kv.fetch(refs, compute):
        pass
    other = make_codec("int8", LAYOUT)
    with kv_store(store, codec=other) as kv:  # the same keys on purpose: in earnest the codec changes them
        with kv.fetch(refs, compute) as got:
            assert all(is_right(chunk, ref, other) for chunk, ref in zip(got.chunks, refs, strict=True))
        assert kv.stats.misses == {("disk", MissReason.OTHER_CODEC): 2}


def test_a_closed_store_refuses():
    kv = kv_store()
    kv.close()
    kv.close()
    with pytest.raises(KVCacheError, match="closed"), kv.fetch([ref_of("a")], Computer()):
        pass


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "half", "swapped", "collision"])
def test_whatever_is_wrong_is_a_logged_miss_and_the_numbers_are_right(place, compute, damage, caplog):
    store, ids = place
    refs = refs_of(ids, 2)
    for ref in refs:  # one file each
        with kv_store(store) as kv, kv.fetch([ref], compute):
            pass
    paths = [path for path, _ in store.kv_listing()]
    content = paths[0].read_bytes()
    wanted = refs[0]
    if damage == "missing":
        paths[0].unlink()
    elif damage == "truncated":
        os.truncate(paths[0], 4200)
    elif damage == "flipped":
        paths[0].write_bytes(content[:4300] + bytes([content[4300] ^ 8]) + content[4301:])
    elif damage == "half":
        paths[0].write_bytes(content[:4096] + bytes(len(content) - 4096))
    elif damage == "swapped":
        paths[0].write_bytes(paths[1].read_bytes().ljust(len(content), b"\0"))
    else:
        wanted = dataclasses.replace(refs[1], key=refs[0].key)
    caplog.set_level(logging.WARNING)
    with kv_store(store) as kv:
        with kv.fetch([wanted], compute) as got:
            assert is_right(got.chunks[0], wanted)
            assert got.report.misses == 1
        assert sum(kv.stats.misses.values()) == 1
        assert MissReason.ABSENT not in {reason for _, reason in kv.stats.misses}
    assert "it is computed again" in caplog.text
    with kv_store(store) as kv, kv.fetch([wanted], compute) as got:  # and is whole again afterwards
        assert got.report.hits == 1


class Saboteur(threading.Thread):
    """Damages stored KV in every way while others read it."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder = folder
        self.stop = threading.Event()
        self.random = random.Random(1)
        self.done = 0

    def run(self):
        while not self.stop.wait(0.005):
            try:
                paths = list(self.folder.rglob("*.kv"))  # a folder may go while it is listed
                if len(paths) < 2:
                    continue
                path, other = self.random.sample(paths, 2)
                content = bytearray(path.read_bytes())
                kind = self.random.randrange(4)
                if kind == 0:
                    content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
                    path.write_bytes(content)
                elif kind == 1:
                    os.truncate(path, self.random.randrange(len(content)))
                elif kind == 2:
                    path.unlink()
                else:
                    path.write_bytes(other.read_bytes())
                self.done += 1
            except (OSError, ValueError, IndexError):
                continue


@pytest.mark.parametrize("decides", [False, True])
def test_a_hundred_requests_among_collisions_eviction_and_damage_all_get_fresh_numbers(place, decides):
    store, ids = place
    refs = refs_of(ids, 24)
    # Every third chunk has the key of another one: a forced collision.
    refs += [dataclasses.replace(refs[number], key=refs[(number + 1) % 24].key) for number in range(0, 24, 3)]
    one = encoded_of(CODEC, refs[12]).nbytes
    fresh = {ref: decode_chunk(CODEC, encoded_of(CODEC, ref)) for ref in refs}
    compute = Computer()
    coin = random.Random(5)
    controller = Deciding(lambda chunk: coin.random() < 0.3) if decides else None
    with kv_store(store, budget=6 * one, disk=10 * 8192, controller=controller) as kv:
        with kv.fetch(refs, compute):
            pass
        kv.flush()
        saboteur = Saboteur(store.folder)
        saboteur.start()

        def ask(seed):
            chosen = random.Random(seed).choices(refs, k=6)
            kv.prefetch(chosen[:2])
            with kv.fetch(chosen, compute) as got:
                for ref, chunk in zip(chosen, got.chunks, strict=True):
                    mine = decode_chunk(CODEC, chunk)
                    assert mine.token_ids == ref.token_ids
                    for (a, b), (c, d) in zip(mine.layers, fresh[ref].layers, strict=True):
                        assert torch.equal(a, c)
                        assert torch.equal(b, d)
            return True

        with ThreadPoolExecutor(100) as pool:
            assert all(pool.map(ask, range(100)))
        # Where all hundred overlap, one of them pins each kept chunk at all times; one after another something leaves.
        for seed in range(100, 120):
            assert ask(seed)
        saboteur.stop.set()
        saboteur.join()
        kv.flush()
        assert kv.memory.evictions > 0
        assert kv.memory.bytes_used <= kv.memory.budget_bytes
        assert all(held.pins == 0 for held in kv.memory._held.values())
        assert kv._in_flight == {}
        assert saboteur.done > 0


def test_the_hit_rate_does_not_decay_while_the_corpus_is_larger_than_the_cache(compute):
    source = random.Random(0)
    refs = [ref_of(number, 4) for number in range(400)]
    one = encoded_of(CODEC, refs[0]).nbytes
    rates = []
    with kv_store(budget=100 * one) as kv:
        for _ in range(6):
            hits = asked = 0
            for _ in range(50):
                chosen = [refs[min(int(source.paretovariate(0.9)) - 1, 399)] for _ in range(5)]
                with kv.fetch(chosen, compute) as got:
                    hits += got.report.hits
                    asked += got.report.hits + got.report.misses
            rates.append(hits / asked)
    assert min(rates[1:]) > 0.6
    assert rates[-1] > rates[1] - 0.1


def test_keys_are_held_apart_by_their_tokens_in_flight(compute):
    mine, other = ref_of("a"), dataclasses.replace(ref_of("b"), key=key_of("a"))
    with kv_store() as kv, kv.fetch([mine, other], compute) as got:
        assert [is_right(chunk, ref) for chunk, ref in zip(got.chunks, (mine, other), strict=True)] == [True, True]


def test_what_no_backing_tier_has_is_absent(place, compute, tmp_path):
    store, ids = place
    refs = refs_of(ids, 4)
    remote = RemoteTier((tmp_path / "remote").as_uri(), 10**9, make_policy("cost"))
    disk = SegmentTier(store, 10**9, make_policy("cost"))
    disk.save([encoded_of(CODEC, refs[0])])
    remote.save([encoded_of(CODEC, refs[2])])
    with KVStore(CODEC, MemoryTier("ram", 10**8, make_policy("cost")), [disk, remote]) as kv:
        assert kv.absent(refs) == [refs[1], refs[3]]
        assert kv.absent([]) == []


def test_chunks_are_written_where_there_is_room_and_nothing_leaves_for_them(place):
    store, ids = place
    refs = refs_of(ids, 8)
    encoded = [encoded_of(CODEC, ref) for ref in refs]
    with kv_store(store, disk=200_000) as kv:
        assert kv.write(encoded[:4])
        assert kv.absent(refs) == refs[4:]
        kv.backing[0].budget_bytes = kv.backing[0].bytes_used + 10_000
        assert not kv.write(encoded[4:])
        assert kv.absent(refs) == refs[4:]
        assert kv.stats.saved["disk"] == 4
        assert len(kv.memory) == 0


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "entropy2", "int4+bf16"])
def test_whether_a_chunk_is_loaded_or_computed_changes_none_of_its_bytes(place, compute, name):
    store, ids = place
    codec, refs = make_codec(name, LAYOUT), refs_of(ids, 6)
    with kv_store(store, codec=codec) as kv, kv.fetch(refs, compute):
        pass
    found = {}
    for declined in (0, 3, 6):
        controller = Deciding(lambda chunk, declined=declined: chunk.ref in refs[:declined])
        with (
            kv_store(store, codec=codec, controller=controller) as kv,
            kv.fetch(refs, compute) as got,
        ):
            assert (got.report.hits, got.report.recomputed, got.report.misses) == (6 - declined, declined, 0)
            assert kv.stats.recomputed == kv.stats.computed == declined
            found[declined] = [chunk.data.clone() for chunk in got.chunks]
    for a, b, c in zip(*found.values(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_chunk_computed_although_it_is_stored_is_neither_miss_nor_hole_nor_written_again(place, compute):
    store, ids = place
    refs = refs_of(ids, 5)
    with kv_store(store) as kv, kv.fetch(refs[1:], compute):
        pass
    with kv_store(store, controller=Deciding(lambda chunk: chunk.ref in refs[2:4])) as kv:
        with kv.fetch(refs, compute) as got:
            report = got.report
            assert (report.hits, report.misses, report.holes, report.recomputed) == (2, 1, 1, 2)
            assert report.bytes_by_tier == {"disk": got.chunks[1].nbytes + got.chunks[4].nbytes}
        kv.flush()
        assert kv.stats.saved == {"disk": 1}
        with kv.fetch(refs, compute) as got:
            assert (got.report.hits, got.report.recomputed, got.report.bytes_by_tier.keys()) == (5, 0, {"ram"})


def test_a_damaged_chunk_is_a_miss_also_where_the_controller_would_load_it(place, compute):
    store, ids = place
    refs = refs_of(ids, 4)
    with kv_store(store) as kv, kv.fetch(refs, compute):
        pass
    for path, _ in store.kv_listing():
        path.write_bytes(bytes(path.stat().st_size))
    with kv_store(store, controller=Deciding(lambda chunk: chunk.ref == refs[0])) as kv:
        with kv.fetch(refs, compute) as got:
            assert (got.report.hits, got.report.misses, got.report.recomputed) == (0, 3, 1)
            assert all(is_right(chunk, ref) for chunk, ref in zip(got.chunks, refs, strict=True))
        assert kv.stats.misses["disk", MissReason.HEADER] == 3


def test_what_loading_and_computing_cost_is_measured_on_the_way(place, compute, tmp_path):
    _, ids = place
    refs = refs_of(ids, 6)
    controller = Deciding(lambda chunk: False)
    remote = RemoteTier((tmp_path / "remote").as_uri(), 10**9, make_policy("cost"))
    memory = MemoryTier("ram", 10**8, make_policy("cost"))
    with KVStore(CODEC, memory, [remote], controller=controller) as kv:
        with kv.fetch(refs, compute):
            kv.flush()
        assert set(controller.costs()) == {COMPUTING}
        kv.discard([ref.key for ref in refs])
        with kv.fetch(refs, compute) as got:
            assert got.report.hits == 6
        assert set(controller.costs()) == {COMPUTING, "file"}
        assert controller._computing.count > 0
        assert controller._loading["file"]._model.count > 0


def test_only_what_is_worth_loading_is_prefetched(place, compute):
    store, ids = place
    refs = refs_of(ids, 6)
    with kv_store(store) as kv, kv.fetch(refs, compute):
        pass
    with kv_store(store, controller=Deciding(lambda chunk: chunk.ref in refs[:4])) as kv:
        kv.prefetch(refs)
        for _ in range(500):
            if kv.stats.prefetched == 2:
                break
            time.sleep(0.01)
        time.sleep(0.05)
        assert kv.missing(refs) == refs[:4]


def test_nobody_waits_for_a_prefetch_that_hangs(place, compute, monkeypatch):
    store, ids = place
    refs = refs_of(ids, 1)
    with kv_store(store) as kv, kv.fetch(refs, compute):
        pass
    begun, go_on = threading.Event(), threading.Event()
    with kv_store(store, controller=LoadController(Cost(0.01, 0.0))) as kv:
        load = kv.load

        def hanging(*arguments, **options):
            begun.set()
            go_on.wait(10)
            return load(*arguments, **options)

        monkeypatch.setattr(kv, "load", hanging)
        kv.prefetch(refs)
        assert begun.wait(5)
        with kv.fetch(refs, compute) as got:
            assert (got.report.recomputed, got.report.hits) == (1, 0)
            assert is_right(got.chunks[0], refs[0])
        go_on.set()
    assert kv._in_flight == {}


def pooled_store(refs):
    """A store whose pool holds the decoded chunks of `refs`."""
    tier = PoolTier(KVPool(LAYOUT, 16, torch.device("cpu"), 16), 16, make_policy("lru"))
    for ref in refs:
        tier.add(decode_chunk(CODEC, encoded_of(CODEC, ref)), ref).release()
    return kv_store(pool=tier), tier


def test_chunks_in_the_pool_are_taken_from_there_and_not_loaded(compute):
    refs = [ref_of(name) for name in "abc"]
    store, tier = pooled_store(refs[:2])
    with store, store.fetch([*refs, refs[0]], compute) as fetched:
        assert [type(chunk) for chunk in fetched.chunks] == [PinnedBlocks, PinnedBlocks, EncodedKV, PinnedBlocks]
        assert compute.computed == [refs[2]]
        assert fetched.report.bytes_by_tier == {"gpu": 40 * LAYOUT.bytes_per_token}
        assert (fetched.report.hits, fetched.report.misses) == (2, 1)
        tier.give_back(16)
        assert tier.refs() == refs[:2]  # pinned
    assert store.stats.hits["gpu"] == 2
    assert tier.pool.num_free == 16  # the store is closed


def test_a_chunk_in_both_memories_leaves_both(compute):
    refs = [ref_of(name) for name in "ab"]
    store, tier = pooled_store(refs[:1])
    with store:
        for ref in refs:
            store.memory.add(encoded_of(CODEC, ref)).release()
        assert store.refs() == refs
        assert store.missing([*refs, ref_of("c")]) == [ref_of("c")]
        store.reown(refs[0], "heir")
        assert {ref.chunk_id for ref in (*tier.refs(), *store.memory.refs()) if ref.key == refs[0].key} == {"heir"}
        store.discard([refs[0].key])
        assert store.refs() == refs[1:]
        assert store.bytes_by_tier()["gpu"] == 0


def test_a_request_whose_store_is_closed_meanwhile_says_so_and_holds_nothing(place, compute, monkeypatch):
    store, chunk_ids = place
    refs = [ref_of("a", chunk_id=chunk_ids[0])]
    kv = kv_store(store)
    monkeypatch.setattr(kv, "stored", lambda refs: kv.close() or {})  # just before it would load
    with pytest.raises(KVCacheError, match="closed"), kv.fetch(refs, compute):
        pass
    assert not kv._in_flight


def test_chunks_that_cannot_wait_to_be_written_are_counted_and_named_once(place, compute, monkeypatch, caplog):
    monkeypatch.setattr("ragkit.kvcache.kv_saver._UNSAVED_BYTES", 0)
    store, chunk_ids = place
    refs = [ref_of(name, chunk_id=chunk_ids[0]) for name in "abc"]
    with kv_store(store) as kv:
        with caplog.at_level(logging.WARNING), kv.fetch(refs, compute):
            pass
        assert kv.stats.not_saved["disk"] == 3
    assert [record.message for record in caplog.records] == [
        "KV of chunks stays in memory only: too much waits to be written"
    ]


def test_what_is_computed_after_the_store_was_closed_is_not_written_and_nobody_waits_for_that(place, compute):
    store, chunk_ids = place
    refs = [ref_of("a", chunk_id=chunk_ids[0])]
    kv = kv_store(store)

    def compute_and_close(refs):
        kv.close()
        return compute(refs)

    with kv.fetch(refs, compute_and_close) as fetched:
        assert is_right(fetched.chunks[0], refs[0])
    waits = threading.Thread(target=kv.flush, daemon=True)
    waits.start()
    waits.join(5)
    assert not waits.is_alive()
    assert kv.stats.not_saved["disk"] == 1
