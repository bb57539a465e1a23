"""Records of a document's windows: what was kept is written, whatever ends a batch."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from page_doubles import RecordsInMemory, interrupted

from ragkit.kvcache import page_records
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_segment import KVMissError, MissReason
from ragkit.kvcache.page_records import PageRecords


def window(number):
    ref = ChunkRef(KVKey(f"{number:064x}"), (number,), "c" * 32)
    return EncodedKV.pack(ref, "page", [torch.full((40,), number, dtype=torch.uint8)])


class FailsOnce(RecordsInMemory):
    """A tier whose first batch fails with `error`."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def save(self, chunks):
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().save(chunks)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("some"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("by_thread", [False, True])
def test_a_batch_that_fails_for_any_reason_is_written_later(monkeypatch, error, by_thread):
    monkeypatch.setattr(page_records, "_SAVED_BYTES", 1 if by_thread else 1 << 20)
    tier = FailsOnce(error)
    records = PageRecords(tier, "page", 1)
    first, second = window(1), window(2)
    records.write(first)
    with pytest.raises(type(error)):
        records.flush()
    records.write(second)
    records.flush()
    records.close()
    assert tier.records.keys() == {first.ref.key, second.ref.key}


def test_an_interrupt_while_a_batch_is_written_leaves_it_being_written(monkeypatch):
    monkeypatch.setattr(page_records, "_SAVED_BYTES", 1)
    may_go_on = threading.Event()

    class Slow(RecordsInMemory):
        def save(self, chunks):
            assert may_go_on.wait(10)
            return super().save(chunks)

    tier = Slow()
    records = PageRecords(tier, "page", 1)
    assert records.write(window(1)) == 1

    with monkeypatch.context() as patch:
        patch.setattr(page_records, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            records.flush()
    may_go_on.set()
    records.flush()
    assert tier.saved == 1
    records.close()


def test_a_batch_that_no_thread_can_be_had_for_goes_on_waiting(monkeypatch):
    monkeypatch.setattr(page_records, "_SAVED_BYTES", 1)
    tier, one = RecordsInMemory(), window(1)
    records = PageRecords(tier, "page", 1)

    def none_left(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError, match="new thread"):
            records.write(one)
    records.flush()
    assert tier.records.keys() == {one.ref.key}


def test_a_whole_record_whose_segment_is_written_anew_meanwhile_is_read_again():
    class Moves(RecordsInMemory):
        moved = False

        @contextlib.contextmanager
        def open(self, *arguments):
            if not self.moved:
                self.moved = True
                raise KVMissError(MissReason.UNREADABLE, "its file is gone")
            with super().open(*arguments) as reader:
                yield reader

    tier, one = Moves(), window(3)
    records = PageRecords(tier, "page", 1)
    records.write(one)
    records.flush()
    assert torch.equal(records.load(one.ref).layer(0), one.layer(0))
