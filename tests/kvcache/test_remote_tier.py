import logging

import pytest
import torch
from kv_samples import LAYOUT, encoded_of, ref_of

from ragkit.errors import KVCacheError
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_segment import KVMissError, MissReason
from ragkit.kvcache.remote_tier import RemoteTier

CODEC = make_codec("int8", LAYOUT)


def tier_of(folder, budget=10**9):
    return RemoteTier(f"file://{folder}/kv", budget, make_policy("lru"))


def load(tier, ref):
    with tier.open(ref, CODEC.codec_id, 2) as reader:
        return reader.load()


def reason(tier, ref):
    with pytest.raises(KVMissError) as caught:
        load(tier, ref)
    return caught.value.reason


def test_chunks_come_back_on_another_machine(tmp_path):
    refs = [ref_of(number) for number in range(4)]
    assert tier_of(tmp_path).save([encoded_of(CODEC, ref) for ref in refs]) == 4
    again = tier_of(tmp_path)
    assert all(torch.equal(load(again, ref).data, encoded_of(CODEC, ref).data) for ref in refs)
    assert again.bytes_used == sum(path.stat().st_size for path in tmp_path.rglob("*.kv"))


def test_a_file_system_in_memory_works_alike():
    tier = RemoteTier("memory://ragkit-test", 10**9, make_policy("lru"))
    tier.save([encoded_of(CODEC, ref_of("a"))])
    assert torch.equal(load(tier, ref_of("a")).data, encoded_of(CODEC, ref_of("a")).data)
    assert tier.name == "memory"


def test_the_objects_stay_within_the_budget(tmp_path):
    first = tier_of(tmp_path)
    first.save([encoded_of(CODEC, ref_of(0))])
    one = first.bytes_used
    tier = tier_of(tmp_path, 3 * one)
    for number in range(1, 6):
        tier.save([encoded_of(CODEC, ref_of(number))])
        load(tier, ref_of(1))
    assert len(list(tmp_path.rglob("*.kv"))) == 3
    assert [reason(tier, ref_of(number)) for number in (0, 2, 3)] == [MissReason.ABSENT] * 3
    load(tier, ref_of(5))
    assert tier_of(tmp_path, 10).save([encoded_of(CODEC, ref_of(9))]) == 0


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda content: content[: len(content) // 2], MissReason.SHORT),
        (lambda content: content[:4100] + b"\xff" * 4 + content[4104:], MissReason.CHECKSUM),
        (lambda _: b"", MissReason.SHORT),
    ],
)
def test_damaged_objects_are_misses(tmp_path, damage, expected):
    tier = tier_of(tmp_path)
    tier.save([encoded_of(CODEC, ref_of("a"))])
    (path,) = tmp_path.rglob("*.kv")
    path.write_bytes(damage(path.read_bytes()))
    assert reason(tier, ref_of("a")) is expected


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "notes.txt").write_text("mine")
    tier_of(tmp_path, 0).save([encoded_of(CODEC, ref_of("a"))])
    assert (tmp_path / "kv" / "notes.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_reported(tmp_path):
    tier = tier_of(tmp_path)
    (tmp_path / "kv").write_text("a file where a folder should be")
    with pytest.raises(KVCacheError, match="could not be written to file"):
        tier.save([encoded_of(CODEC, ref_of("a"))])
    assert tier.bytes_used == 0


def test_objects_that_cannot_be_removed_count_on_and_leave_no_room_for_others(tmp_path, monkeypatch, caplog):
    first = tier_of(tmp_path)
    first.save([encoded_of(CODEC, ref_of(0))])
    one = first.bytes_used
    tier = tier_of(tmp_path, 2 * one)
    tier.save([encoded_of(CODEC, ref_of(1))])
    remove, stuck = type(tier._files).rm_file, tier._path(ref_of(0).key)

    def rm_file(files, path):
        if path == stuck:
            raise PermissionError("it is not yours")
        remove(files, path)

    monkeypatch.setattr(type(tier._files), "rm_file", rm_file)
    with caplog.at_level(logging.WARNING):
        assert tier.save([encoded_of(CODEC, ref_of(2)), encoded_of(CODEC, ref_of(3))]) == 1
    assert tier.failed_removals == 1
    assert "could not be removed from file and stays: it is not yours" in caplog.text
    assert reason(tier, ref_of(1)) is MissReason.ABSENT
    assert reason(tier, ref_of(2)) is MissReason.ABSENT
    load(tier, ref_of(0))
    load(tier, ref_of(3))  # for which another object left
    assert tier.bytes_used == 2 * one == sum(path.stat().st_size for path in tmp_path.rglob("*.kv"))


def test_an_unknown_kind_of_place_is_refused():
    with pytest.raises(KVCacheError, match=r"cannot be opened: .*; check kv\.remote"):
        RemoteTier("nowhere://x", 1, make_policy("lru"))


def test_sizes_are_known_of_what_was_there_at_the_start_and_of_what_was_written(tmp_path):
    refs = [ref_of(name) for name in "abc"]
    tier_of(tmp_path).save([encoded_of(CODEC, refs[0])])
    tier = tier_of(tmp_path)
    tier.save([encoded_of(CODEC, refs[1])])
    known = tier.known([ref.key for ref in refs])
    assert list(known) == [ref.key for ref in refs[:2]]
    assert sum(record.nbytes for record in known.values()) == tier.bytes_used


def test_credentials_of_the_place_show_neither_in_errors_nor_in_the_log(monkeypatch, caplog):
    import traceback

    from fsspec.implementations.memory import MemoryFileSystem

    def refusing(self, *_, **__):
        raise PermissionError("token sesame refused by memory://me:hunter2@kv")

    url = "memory://me:hunter2@kv?token=sesame"
    tier = RemoteTier(url, 10**9, make_policy("lru"))
    for name in ("exists", "cat_file", "pipe_file"):
        monkeypatch.setattr(MemoryFileSystem, name, refusing)
    said = []
    for fails in (
        lambda: tier.holds([ref_of(1).key]),
        lambda: load(tier, ref_of(1)),
        lambda: tier.save([encoded_of(CODEC, ref_of(1))]),
        lambda: RemoteTier(url, 10**9, make_policy("lru")),
    ):
        with pytest.raises((KVCacheError, KVMissError)) as caught:
            fails()
        said += traceback.format_exception(caught.value)
    assert "***" in "".join(said)
    shown = "".join(line for line in said if "raise " not in line) + caplog.text
    assert "hunter2" not in shown
    assert "sesame" not in shown
