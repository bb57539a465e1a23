import contextlib
import dataclasses
import os

import numpy as np
import pytest
import torch
from kv_samples import LAYOUT, encoded_of, ref_of, store_of

from ragkit.errors import KVCacheError, StoreLockedError
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_segment import KVMissError, MissReason
from ragkit.kvcache.page_records import PageRecords
from ragkit.kvcache.segment_tier import SegmentTier
from ragkit.store import IndexedDocument, SourceUpdate
from ragkit.types import Chunk, Document, chunk_id_of

CODEC = make_codec("bf16", LAYOUT)


@pytest.fixture
def place(tmp_path):
    store, chunk_ids = store_of(tmp_path / "store")
    with store:
        yield store, chunk_ids


def tier_of(store, budget=10**9):
    return SegmentTier(store, budget, make_policy("lru"))


def refs_of(chunk_ids, count):
    return [ref_of(number, 20, chunk_ids[number]) for number in range(count)]


def load(tier, ref):
    with tier.open(ref, CODEC.codec_id, 2) as reader:
        return reader.load()


def reason(tier, ref):
    with pytest.raises(KVMissError) as caught:
        load(tier, ref)
    return caught.value.reason


def found(tier, refs):
    kept = []
    for index, ref in enumerate(refs):
        with contextlib.suppress(KVMissError):
            assert torch.equal(load(tier, ref).data, encoded_of(CODEC, ref).data)
            kept.append(index)
    return kept


def test_saved_chunks_come_back_also_to_another_process(place):
    store, ids = place
    refs = refs_of(ids, 5)
    assert tier_of(store).save([encoded_of(CODEC, ref) for ref in refs]) == 5
    again = tier_of(store)
    assert found(again, refs) == [0, 1, 2, 3, 4]
    assert again.bytes_used == sum(entry.bytes for _, entry in store.kv_listing())
    assert store.verify().problems == ()


def test_remembered_records_are_opened_without_asking_the_catalogue(place, monkeypatch):
    store, ids = place
    refs = refs_of(ids, 3)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs])
    asked, real = [], type(store).kv_entries
    monkeypatch.setattr(type(store), "kv_entries", lambda self, keys: asked.append(len(keys)) or real(self, keys))
    assert tier.holds([ref.key for ref in refs], remember=True) == {ref.key for ref in refs}
    assert found(tier, refs) == [0, 1, 2]
    assert asked == [3]
    assert tier.holds([refs[0].key], remember=True) == {refs[0].key}  # in place of those before
    assert found(tier, refs) == [0, 1, 2]
    assert asked == [3, 1, 1, 1]


def test_remembered_records_that_were_not_there_are_remembered_when_they_are_saved(place, monkeypatch):
    store, ids = place
    refs = refs_of(ids, 3)
    tier = tier_of(store)
    assert tier.holds([ref.key for ref in refs[:2]], remember=True) == set()
    tier.save([encoded_of(CODEC, ref) for ref in refs])
    asked, real = [], type(store).kv_entries
    monkeypatch.setattr(type(store), "kv_entries", lambda self, keys: asked.append(keys) or real(self, keys))
    assert found(tier, refs) == [0, 1, 2]
    assert asked == [[refs[2].key.digest]]


@pytest.fixture
def advised(monkeypatch):
    """What the system is asked to read: offsets and bytes."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot be asked to read files into its cache")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, nbytes, advice: asked.append((offset, nbytes, advice)))
    return asked


def test_the_fronts_of_remembered_records_are_brought_nearer(place, advised):
    store, ids = place
    refs = refs_of(ids, 3)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs])
    tier.holds([ref.key for ref in refs])
    assert advised == []
    tier.holds([ref.key for ref in refs], remember=True)
    offsets = sorted(entry.offset for _, entry in store.kv_listing())
    assert sorted(advised) == [(offset, 8192, os.POSIX_FADV_WILLNEED) for offset in offsets]


def test_what_is_there_is_said_also_where_it_is_written_anew_meanwhile(place, monkeypatch):
    store, ids = place
    refs = refs_of(ids, 3)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs])
    monkeypatch.setattr(
        "ragkit.kvcache.segment_tier._will_read_fronts", lambda places: tier.save([encoded_of(CODEC, refs[1])])
    )
    assert tier.holds([ref.key for ref in refs], remember=True) == {ref.key for ref in refs}
    assert found(tier, refs) == [0, 1, 2]


def test_a_layer_is_brought_nearer_by_the_bytes_that_reading_it_reads(place, advised, monkeypatch):
    store, ids = place
    (ref,) = refs_of(ids, 1)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref)])
    with tier.open(ref, CODEC.codec_id, 2) as reader:
        read, real = [], os.preadv

        def preadv(descriptor, buffers, offset):
            read.append((offset, len(buffers[0])))
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        for layer in range(2):
            reader.will_read(layer)
            reader.layer(layer)
    assert [asked[:2] for asked in advised] == read
    assert len(read) == 2


def test_a_remembered_record_that_was_written_anew_elsewhere_is_found_there(place):
    store, ids = place
    refs = refs_of(ids, 2)
    tier, other = tier_of(store), tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs])
    tier.holds([ref.key for ref in refs], remember=True)
    ((old, _), _) = store.kv_listing()
    other.save([encoded_of(CODEC, ref) for ref in refs[::-1]])
    ((new, _), _) = store.kv_listing()
    assert old != new
    assert found(tier, refs) == [0, 1]


def test_a_remembered_record_that_is_damaged_is_looked_up_again(place):
    store, ids = place
    (ref,) = refs_of(ids, 1)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref)])
    tier.holds([ref.key], remember=True)
    path, entry = store.kv_entries([ref.key.digest])[ref.key.digest]
    content = bytearray(path.read_bytes())
    content[entry.offset + 4500] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    assert reason(tier, ref) is MissReason.CHECKSUM
    tier.save([encoded_of(CODEC, ref)])
    assert found(tier, [ref]) == [0]


@pytest.mark.parametrize(
    "read", [lambda records, ref: records.load(ref).layer(1), lambda records, ref: records.layer(ref, 1)]
)
def test_a_remembered_record_that_another_process_wrote_anew_because_it_was_damaged_is_found(place, read):
    store, ids = place
    refs = refs_of(ids, 2)
    encoded = [encoded_of(CODEC, ref) for ref in refs]
    tier = tier_of(store)
    tier.save(encoded)
    records = PageRecords(tier, CODEC.codec_id, 2)
    assert records.present(refs) == {0, 1}
    path, entry = store.kv_entries([refs[0].key.digest])[refs[0].key.digest]
    content = bytearray(path.read_bytes())
    content[entry.offset + 4096 : entry.offset + entry.bytes] = bytes(entry.bytes - 4096)
    path.chmod(0o600)
    path.write_bytes(content)
    assert tier_of(store).save(encoded[:1]) == 1
    assert path.exists()  # the other record is there still
    assert torch.equal(read(records, refs[0]), encoded[0].layer(1))
    records.close()


def test_one_layer_is_read_alone(place):
    store, ids = place
    (ref,) = refs_of(ids, 1)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref)])
    with tier.open(ref, CODEC.codec_id, 2) as reader:
        assert torch.equal(reader.layer(1), encoded_of(CODEC, ref).layer(1))


def test_an_unknown_chunk_is_absent(place):
    assert reason(tier_of(place[0]), ref_of("x")) is MissReason.ABSENT


def test_the_files_stay_within_the_budget_and_the_best_chunks_stay(place):
    store, ids = place
    refs = refs_of(ids, 30)
    one = tier_of(store)
    one.save([encoded_of(CODEC, refs[0])])
    record = one.bytes_used
    tier = tier_of(store, budget=12 * record)
    for ref in refs[1:]:
        tier.save([encoded_of(CODEC, ref)])
        load(tier, refs[0])  # used all the time
        assert tier.bytes_used <= 12 * record
        assert sum(path.stat().st_size for path in store.folder.rglob("*.kv")) == tier.bytes_used
    kept = found(tier, refs)
    assert kept[0] == 0
    assert kept[-1] == 29
    assert len(kept) >= 6


def test_sparse_segments_are_written_anew(place):
    store, ids = place
    refs = refs_of(ids, 24)
    tier = tier_of(store, budget=10**9)
    tier.save([encoded_of(CODEC, ref) for ref in refs[:12]])  # one file
    whole = tier.bytes_used
    tier.budget_bytes = int(whole * 1.2)
    for ref in refs[6:12]:
        load(tier, ref)
    tier.save([encoded_of(CODEC, refs[12])])
    assert tier.bytes_used <= tier.budget_bytes
    tier.save([encoded_of(CODEC, ref) for ref in refs[13:18]])
    assert tier.bytes_used <= tier.budget_bytes
    kept = found(tier, refs)
    assert set(kept) >= {11, 12, 17}
    assert 0 not in kept
    assert store.verify().problems == ()


def test_what_is_larger_than_the_budget_is_not_kept(place):
    store, ids = place
    (ref,) = refs_of(ids, 1)
    assert tier_of(store, budget=5000).save([encoded_of(CODEC, ref)]) == 0
    assert store.kv_listing() == []


def test_kv_of_an_erased_chunk_is_not_written(place):
    store, ids = place
    refs = refs_of(ids, 2)
    tier = tier_of(store)
    with store.writer() as writer:
        writer.remove(["a.txt"], erase=True)
    assert tier.save([encoded_of(CODEC, ref) for ref in refs]) == 0
    assert store.kv_listing() == []


def test_kv_of_a_removed_chunk_is_absent(place):
    store, ids = place
    refs = refs_of(ids, 2)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs])
    with store.writer() as writer:
        writer.remove(["a.txt"])
    assert reason(tier, refs[0]) is MissReason.ABSENT


def test_writing_a_segment_anew_brings_nothing_back_that_was_removed_meanwhile(place):
    store, ids = place
    refs = refs_of(ids, 9)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs[:8]])
    with store.writer() as writer:  # another process
        writer.remove_kv([refs[7].key.digest])
    tier.budget_bytes = int(tier.bytes_used * 1.1)
    tier.save([encoded_of(CODEC, refs[8])])
    assert reason(tier, refs[7]) is MissReason.ABSENT
    assert {6, 8} <= set(found(tier, refs))


def test_writing_a_segment_anew_leaves_kv_with_the_chunk_it_was_handed_to(place):
    store, ids = place
    refs = refs_of(ids, 9)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs[:8]])
    text = "".join(f"chunk {number:03d}\n" for number in range(41))  # one chunk more at the end
    document = Document.from_text(text, "a.txt")
    spans = [(10 * number, 10 * number + 10) for number in range(41)]
    chunks = [
        Chunk(chunk_id_of(document.doc_id, *span), document.doc_id, index, text[slice(*span)], *span, 3)
        for index, span in enumerate(spans)
    ]
    with store.writer() as writer:
        item = IndexedDocument(document, chunks, np.zeros((41, 2), np.float32))
        writer.commit([SourceUpdate("a.txt", "1" * 64, len(text), 2, documents=(item,))])
    tier.budget_bytes = int(tier.bytes_used * 1.1)
    tier.save([encoded_of(CODEC, dataclasses.replace(refs[8], chunk_id=chunks[8].chunk_id))])
    owners = {entry.key: entry.chunk_id for _, entry in store.kv_listing()}
    assert {6, 8} <= set(found(tier, refs))
    assert all(owners[refs[index].key.digest] == chunks[index].chunk_id for index in found(tier, refs))
    assert store.verify().problems == ()


def test_equal_chunks_are_written_once(place):
    store, ids = place
    ref = refs_of(ids, 1)[0]
    same = dataclasses.replace(ref, chunk_id=ids[1])
    assert tier_of(store).save([encoded_of(CODEC, ref), encoded_of(CODEC, same)]) == 2
    assert len(store.kv_listing()) == 1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), MissReason.UNREADABLE),
        (lambda path: os.truncate(path, 100), MissReason.SHORT),
        (lambda path: os.truncate(path, 5000), MissReason.SHORT),
        (lambda path: path.write_bytes(path.read_bytes()[:4200] + b"\xff" * 8 + path.read_bytes()[4208:]),
         MissReason.CHECKSUM),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), MissReason.HEADER),
    ],
)  # fmt: skip
def test_a_damaged_file_is_a_miss_and_can_be_saved_again(place, damage, expected):
    store, ids = place
    (ref,) = refs_of(ids, 1)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref)])
    damage(store.kv_listing()[0][0])
    assert reason(tier, ref) is expected
    tier.save([encoded_of(CODEC, ref, recompute_ms=2.0)])
    assert found(tier, [ref]) == [0]


def test_swapped_files_are_misses(place):
    store, ids = place
    refs = refs_of(ids, 2)
    tier = tier_of(store)
    for ref in refs:
        tier.save([encoded_of(CODEC, ref)])
    one, other = (path for path, _ in store.kv_listing())
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert [reason(tier, ref) for ref in refs] == [MissReason.OTHER_KEY] * 2


def test_eviction_while_a_chunk_is_loaded_does_no_harm(place):
    store, ids = place
    refs = refs_of(ids, 2)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, refs[0])])
    with tier.open(refs[0], CODEC.codec_id, 2) as reader, store.writer() as writer:
        writer.remove_kv([refs[0].key.digest])
        assert torch.equal(reader.load().data, encoded_of(CODEC, refs[0]).data)
    assert reason(tier, refs[0]) is MissReason.ABSENT


def test_damaged_neighbours_are_lost_when_a_segment_is_written_anew(place):
    store, ids = place
    refs = refs_of(ids, 12)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs[:8]])
    path, entry = store.kv_listing()[7]
    content = bytearray(path.read_bytes())
    content[entry.offset + 4500] ^= 1
    path.write_bytes(content)
    tier.budget_bytes = int(tier.bytes_used * 1.1)
    tier.save([encoded_of(CODEC, refs[8])])
    kept = found(tier, refs)
    assert 7 not in kept
    assert {6, 8} <= set(kept)


def test_a_locked_store_is_reported(place, monkeypatch):
    store, ids = place
    (ref,) = refs_of(ids, 1)
    tier = tier_of(store)
    monkeypatch.setattr("ragkit.kvcache.segment_tier._LOCK_TIMEOUT_S", 0.05)
    with store.writer(), pytest.raises(KVCacheError, match="could not be written to the store") as caught:
        tier.save([encoded_of(CODEC, ref)])
    assert isinstance(caught.value.__cause__, StoreLockedError)


def test_equal_chunks_of_two_documents_share_one_record_that_can_be_replaced(place):
    store, ids = place
    mine, twin = ref_of("same", 20, ids[0]), ref_of("same", 20, ids[1])
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, mine)])
    assert found(tier, [twin]) == [0]
    path, _ = store.kv_listing()[0]
    path.write_bytes(bytes(path.stat().st_size))
    assert reason(tier, twin) is MissReason.HEADER
    tier.save([encoded_of(CODEC, twin, recompute_ms=2.0)])
    assert found(tier, [mine, twin]) == [0, 1]
    assert len(store.kv_listing()) == 1


def test_what_an_earlier_process_wrote_has_no_advantage(place):
    store, ids = place
    refs = refs_of(ids, 16)
    for ref in refs[:8]:
        tier_of(store).save([encoded_of(CODEC, ref)])
    tier = SegmentTier(store, 10**9, make_policy("cost"))
    tier.budget_bytes = tier.bytes_used
    for ref in refs[8:12]:
        tier.save([encoded_of(CODEC, ref)])
        load(tier, ref)
    assert set(found(tier, refs)) >= {8, 9, 10, 11}


def test_what_is_on_disk_is_known_with_its_size(place):
    store, ids = place
    refs = refs_of(ids, 3)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs[:2]])
    entries = store.kv_entries([ref.key.digest for ref in refs])
    known = tier.known([ref.key for ref in refs])
    assert {key.digest: record.nbytes for key, record in known.items()} == {
        digest: entry.bytes for digest, (_, entry) in entries.items()
    }


def test_what_has_left_the_page_cache_is_told_from_what_is_there(place):
    store, ids = place
    refs = refs_of(ids, 2)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs])
    before = [record.is_cached for record in tier.known([ref.key for ref in refs]).values()]
    for path, _ in store.kv_listing():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    after = [record.is_cached for record in tier.known([refs[0].key]).values()]
    if before == [False, False] or after == [True]:
        pytest.skip("this file system does not say what is in the page cache, or keeps everything there")
    assert (before, after) == ([True, True], [False])
    assert found(tier, refs) == [0, 1]


def test_of_a_file_that_is_gone_nothing_is_in_the_page_cache(place):
    store, ids = place
    refs = refs_of(ids, 1)
    tier = tier_of(store)
    tier.save([encoded_of(CODEC, ref) for ref in refs])
    for path, _ in store.kv_listing():
        path.unlink()
    (record,) = tier.known([ref.key for ref in refs]).values()
    assert not record.is_cached
