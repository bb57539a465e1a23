import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.kv_key import KVKey
from ragkit.kvcache.kv_segment import KVMissError, MissReason
from ragkit.kvcache.open_records import OpenRecords


def ref_of(number):
    return ChunkRef(KVKey(f"{number:064x}"), (number,), "owner")


class Records:
    """Records that count how often they are opened and closed."""

    def __init__(self):
        self.opened, self.closed, self.expected, self.told, self.fails = [], [], [], [], {}

    @contextlib.contextmanager
    def open(self, ref):
        self.opened.append(ref.token_ids[0])
        try:
            yield Reader(self, ref.token_ids[0])
        except KVMissError as error:
            self.told.append(error.reason)
            raise
        finally:
            self.closed.append(ref.token_ids[0])


class Reader:
    def __init__(self, records, number):
        self.records, self.number = records, number

    def will_read(self, index):
        self.records.expected.append((self.number, index))

    def layer(self, index):
        reasons = self.records.fails.get(self.number)
        if reasons:
            raise KVMissError(reasons.pop(), "it cannot be read")
        return torch.tensor([self.number, index])


def test_the_records_used_last_stay_open():
    records = Records()
    opened = OpenRecords(records.open, most=2)
    for number in (1, 2, 1, 3, 1, 2):
        assert opened.layer(ref_of(number), 7).tolist() == [number, 7]
    assert (records.opened, records.closed) == ([1, 2, 3, 2], [2, 3])
    opened.close()
    assert records.closed == [2, 3, 1, 2]


def test_a_record_that_will_be_read_is_opened_once():
    records = Records()
    opened = OpenRecords(records.open)
    for number in (1, 2):
        opened.will_read(ref_of(number), 5)
    assert [opened.layer(ref_of(number), 5).tolist() for number in (1, 2)] == [[1, 5], [2, 5]]
    assert (records.opened, records.expected) == ([1, 2], [(1, 5), (2, 5)])


def test_a_record_that_cannot_be_opened_says_so_when_it_is_read():
    def absent(ref):
        raise KVMissError(MissReason.ABSENT, "gone")

    opened = OpenRecords(absent)
    opened.will_read(ref_of(1), 0)
    with pytest.raises(KVMissError, match="gone"):
        opened.layer(ref_of(1), 0)


@pytest.mark.parametrize("reason", [MissReason.UNREADABLE, MissReason.SHORT, MissReason.CHECKSUM])
def test_a_record_that_may_be_elsewhere_now_is_opened_again_by_who_was_told_why(reason):
    records = Records()
    records.fails[1] = [reason]
    opened = OpenRecords(records.open)
    assert opened.layer(ref_of(1), 0).tolist() == [1, 0]
    assert (records.opened, records.closed, records.told) == ([1, 1], [1], [reason])


@pytest.mark.parametrize("reasons", [[MissReason.HEADER], [MissReason.UNREADABLE, MissReason.CHECKSUM]])
def test_a_record_that_cannot_be_read_is_closed(reasons):
    records = Records()
    records.fails[1] = list(reasons)
    opened = OpenRecords(records.open)
    with pytest.raises(KVMissError):
        opened.layer(ref_of(1), 0)
    assert len(records.closed) == len(records.opened) == len(reasons)
    assert records.told == reasons[::-1]


def test_threads_read_records_side_by_side_and_nothing_stays_open():
    records, together = Records(), threading.Barrier(4)
    plain = records.open

    @contextlib.contextmanager
    def open_together(ref):
        together.wait(timeout=20)  # four records are opened at once, or this fails
        with plain(ref) as reader:
            yield reader

    opened = OpenRecords(open_together, most=2)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: opened.layer(ref_of(number), number).tolist(), range(4)))
    assert found == [[number, number] for number in range(4)]
    opened.close()
    assert sorted(records.opened) == sorted(records.closed)
