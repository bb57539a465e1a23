"""What came from a far place is kept on the local disk, once, whole and within the budget."""

from __future__ import annotations

import logging
import os

import pytest
from kv_samples import LAYOUT, chunk_of, encoded_of, ref_of, store_of

from ragkit.errors import StoreError
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_segment import MissReason
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.remote_tier import RemoteTier
from ragkit.kvcache.segment_tier import SegmentTier
from ragkit.store import Store
from ragkit.store.writer import Writer

CODEC = make_codec("int4", LAYOUT)


class CountingRemote(RemoteTier):
    """Counts the objects that are read."""

    reads = 0

    def open(self, ref, codec_id, num_layers):
        self.reads += 1
        return super().open(ref, codec_id, num_layers)


@pytest.fixture
def place(tmp_path):
    """A store without KV, and a remote place that has the KV of six of its chunks."""
    store, ids = store_of(tmp_path / "store")
    refs = [ref_of(number, 10 + number, ids[number]) for number in range(6)]
    with store:
        assert remote_of(tmp_path).save([encoded_of(CODEC, ref) for ref in refs]) == 6
        yield tmp_path, store, refs


def remote_of(folder):
    return CountingRemote(f"file://{folder}/remote", 10**9, make_policy("lru"))


def computing(refs):
    return [chunk_of(ref) for ref in refs]


def ask(place, refs, *, disk=10**9):
    """Fetch `refs` in a process of its own, as it were; return the tiers' bytes, reads of the remote place, stats."""
    folder, store, _ = place
    remote = remote_of(folder)
    tiers = [SegmentTier(store, disk, make_policy("cost")), remote]
    with KVStore(CODEC, MemoryTier("ram", 10**8, make_policy("cost")), tiers) as kv:
        with kv.fetch(refs, computing) as got:
            for chunk, ref in zip(got.chunks, refs, strict=True):
                assert chunk.data.tolist() == encoded_of(CODEC, ref).data.tolist()
            report = got.report
        kv.flush()
    return report, remote.reads, kv.stats


def test_a_second_process_reads_nothing_from_the_remote_place(place):
    refs = place[2]
    first, reads, stats = ask(place, refs)
    assert (first.hits, first.misses, reads) == (6, 0, 6)
    assert stats.saved == {"disk": 6}  # the remote place has them already
    second, reads, stats = ask(place, refs)
    assert (second.hits, second.bytes_by_tier.keys(), reads) == (6, {"disk"}, 0)
    assert stats.saved == {}
    assert place[1].verify().problems == ()


def test_a_damaged_copy_is_fetched_again_and_then_computed(place):
    folder, store, refs = place
    ask(place, refs)
    for path in {path for path, _ in store.kv_listing()}:
        path.write_bytes(bytes(path.stat().st_size))
    again, reads, stats = ask(place, refs)
    assert (again.hits, again.misses, again.bytes_by_tier.keys(), reads) == (6, 0, {"file"}, 6)
    assert stats.misses["disk", MissReason.HEADER] == 6
    assert "6 chunks" in again.damage
    assert again.damage.endswith("it is taken from elsewhere")
    assert ask(place, refs)[1] == 0  # whole again
    for path in {path for path, _ in store.kv_listing()} | set((folder / "remote").rglob("*.kv")):
        os.truncate(path, 4096)
    computed, _, stats = ask(place, refs)
    assert (computed.hits, computed.misses, stats.computed) == (0, 6, 6)
    assert stats.saved == {"disk": 6, "file": 6}


def test_copies_stay_within_the_budget_of_the_disk(place):
    _, store, refs = place
    record = store_bytes(place)
    budget = 4 * record
    ask(place, refs, disk=budget)
    on_disk = sum({path: path.stat().st_size for path, _ in store.kv_listing()}.values())
    assert 0 < on_disk <= budget
    assert ask(place, refs, disk=budget)[1] < 6


def store_bytes(place):
    """Bytes of the largest record."""
    return max(path.stat().st_size for path in (place[0] / "remote").rglob("*.kv"))


def test_a_full_disk_is_named_once_and_fails_nothing(place, monkeypatch, caplog):
    folder, store, refs = place
    writer = type(store).writer

    def full(self, *_, **__):
        raise StoreError("no space left on device")

    monkeypatch.setattr(type(store), "writer", full)
    remote = remote_of(folder)
    tiers = [SegmentTier(store, 10**9, make_policy("cost")), remote]
    with caplog.at_level(logging.WARNING), KVStore(CODEC, MemoryTier("ram", 0, make_policy("lru")), tiers) as kv:
        for _ in range(3):
            with kv.fetch(refs, computing) as got:
                assert (got.report.hits, got.report.misses) == (6, 0)
            kv.flush()
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert "are not copied to the tier disk" in said[0]
        assert said[0].endswith("no space left on device")
        assert kv.stats.not_saved == {"disk": 18}
        monkeypatch.setattr(type(store), "writer", writer)
        with kv.fetch(refs, computing):
            pass
        kv.flush()
        assert kv.stats.saved["disk"] == 6
    assert ask(place, refs)[1] == 0


def test_text_that_has_left_the_store_does_not_come_back_through_its_kv(place):
    folder, store, refs = place
    gone = [ref_of(number, 10 + number, "gone") for number in range(2)]
    remote_of(folder).save([encoded_of(CODEC, ref) for ref in gone])
    report, _, stats = ask(place, [*gone, *refs[2:]])
    assert report.hits == 6
    assert stats.saved == {"disk": 4}
    assert {entry.chunk_id for _, entry in store.kv_listing()} == {ref.chunk_id for ref in refs[2:]}


def test_another_process_sees_a_segment_of_copies_when_it_is_whole(place, monkeypatch):
    _, store, refs = place
    seen = []
    with Store.open(store.folder) as other:
        add_kv = Writer.add_kv

        def watched(self, parts, entries):
            before = len(other.kv_listing())

            def one_after_the_other():
                for part in parts:
                    seen.append(len(other.kv_listing()) - before)
                    yield part

            return add_kv(self, one_after_the_other(), entries)

        monkeypatch.setattr(Writer, "add_kv", watched)
        ask(place, refs)
        assert len(seen) >= 6
        assert not any(seen)
        assert len(other.kv_listing()) == 6
