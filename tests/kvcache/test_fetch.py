"""A request says in one line what was wrong with the stored KV of its chunks."""

from __future__ import annotations

import logging
import time

import pytest
from kv_samples import LAYOUT, chunk_of, encoded_of, ref_of, store_of

from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_segment import MissReason
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.segment_tier import SegmentTier

CODEC = make_codec("int4", LAYOUT)


@pytest.fixture
def place(tmp_path):
    """A store with the KV of five chunks, in a file each."""
    store, ids = store_of(tmp_path / "store")
    refs = [ref_of(number, 10 + number, ids[number]) for number in range(5)]
    with store:
        tier = SegmentTier(store, 10**9, make_policy("lru"))
        for ref in refs:
            tier.save([encoded_of(CODEC, ref)])
        yield store, refs


def opened(store):
    tier = SegmentTier(store, 10**9, make_policy("lru"))
    return KVStore(CODEC, MemoryTier("ram", 10**8, make_policy("lru")), [tier], load_threads=1)


def computing(refs):
    return [chunk_of(ref) for ref in refs]


def damaged(store, count):
    """Zero the first `count` files; return their names in the order of the chunks."""
    paths = [path for path, _ in store.kv_listing()][:count]
    for path in paths:
        path.write_bytes(bytes(path.stat().st_size))
    return [path.name for path in paths]


@pytest.mark.parametrize(("count", "begins"), [(1, "1 chunk, in "), (3, "3 chunks, the first in ")])
def test_damage_is_told_in_one_line_with_the_count_and_the_first_file(place, caplog, count, begins):
    store, refs = place
    names = damaged(store, count)
    with opened(store) as kv, caplog.at_level(logging.WARNING), kv.fetch(refs, computing) as got:
        report = got.report
    assert report.misses == count
    assert report.damage.startswith(f"the stored KV of {begins}{names[0]}, cannot be used (")
    assert report.damage.endswith("): it is computed again")
    assert [record.getMessage() for record in caplog.records] == [report.damage]
    assert kv.stats.misses["disk", MissReason.HEADER] == count


def test_chunks_that_were_never_stored_are_no_damage(place, caplog):
    store, refs = place
    with opened(store) as kv, caplog.at_level(logging.WARNING):
        with kv.fetch([*refs, ref_of("new", chunk_id=refs[0].chunk_id)], computing) as got:
            assert (got.report.misses, got.report.damage) == (1, "")
        with kv.fetch(refs, computing) as got:
            assert got.report.damage == ""
    assert caplog.records == []


def test_a_prefetch_says_nothing_of_damage_and_the_request_behind_it_does(place, caplog):
    store, refs = place
    damaged(store, 2)
    with opened(store) as kv, caplog.at_level(logging.WARNING):
        kv.prefetch(refs)
        for _ in range(500):
            if kv.stats.prefetched == 3:
                break
            time.sleep(0.01)
        assert kv.stats.prefetched == 3
        assert not kv.stats.misses
        assert caplog.records == []
        with kv.fetch(refs, computing) as got:
            assert (got.report.misses, got.report.hits) == (2, 3)
            assert "2 chunks" in got.report.damage
    assert kv.stats.misses["disk", MissReason.HEADER] == 2
    assert len(caplog.records) == 1
