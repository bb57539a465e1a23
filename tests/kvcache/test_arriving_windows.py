import threading

import pytest
import torch

from ragkit.kvcache import arriving_windows as module
from ragkit.kvcache.arriving_windows import arriving_windows

CPU = torch.device("cpu")


def numbered(window, row):
    assert row.shape == (4,)
    row.fill_(window)
    return "disk"


@pytest.fixture
def batches_of_2(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 512)
    monkeypatch.setattr(module, "_STAGED_BYTES", 512)
    monkeypatch.setattr(module, "_READERS", 2)


def arriving(windows):
    return arriving_windows(windows, 4, numbered, CPU)


@pytest.mark.parametrize(
    ("staged_bytes", "spans"),
    [(0, [range(2, 5), range(5, 8), range(8, 10)]), (1700, [range(2, 8), range(8, 10)])],
)
def test_windows_come_in_order_some_batches_at_a_time(monkeypatch, staged_bytes, spans):
    monkeypatch.setattr(module, "_BATCH_BYTES", 768)
    monkeypatch.setattr(module, "_STAGED_BYTES", staged_bytes)
    monkeypatch.setattr(module, "_READERS", 3)
    found = [(some.windows, some.places, some.data[:, :4].tolist()) for some in arriving(range(2, 10))]
    assert [windows for windows, _, _ in found] == spans
    assert [row for _, _, data in found for row in data] == [[window] * 4 for window in range(2, 10)]
    assert [place for _, places, _ in found for place in places] == ["disk"] * 8
    assert list(arriving(range(3, 3))) == []


def test_one_batch_is_read_while_the_one_before_is_placed_and_no_more(batches_of_2):
    began, more = set(), threading.Semaphore(0)

    def read(window, row):
        began.add(window)
        more.release()
        return numbered(window, row)

    windows = arriving_windows(range(8), 4, read, CPU)
    next(windows)
    for _ in range(4):
        assert more.acquire(timeout=10)
    assert began == {0, 1, 2, 3}
    windows.close()


def test_what_cannot_be_read_is_told_when_its_batch_comes(batches_of_2):
    def read(window, row):
        if window == 5:
            raise OSError("gone")
        return numbered(window, row)

    seen = []
    with pytest.raises(OSError, match="gone"):
        seen.extend(some.windows for some in arriving_windows(range(8), 4, read, CPU))
    assert seen == [range(2), range(2, 4)]


@pytest.mark.parametrize(
    ("windows", "window_bytes", "rows"), [(3, 2 << 20, [3]), (100, 2 << 20, [32, 32]), (100, 20 << 20, [8, 8])]
)
def test_a_batch_has_64_mb_but_no_more_rows_than_windows_and_one_for_each_reader(
    monkeypatch, windows, window_bytes, rows
):
    taken = []

    class Counted(module._Batch):
        def __init__(self, device, count, row_bytes):
            taken.append(count)
            super().__init__(device, count, row_bytes)

    monkeypatch.setattr(module, "_Batch", Counted)
    for _ in arriving_windows(range(windows), window_bytes, lambda window, row: "disk", CPU):
        pass
    assert taken == rows


@pytest.mark.parametrize(("free", "staged"), [(80 << 30, 512 << 20), (1 << 30, 512 << 20), (100 << 20, 50 << 20)])
def test_windows_before_they_are_placed_take_half_a_gigabyte_and_at_most_half_of_what_is_free(
    monkeypatch, free, staged
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    assert module._most_staged(torch.device("cuda")) == staged
    assert module._most_staged(CPU) == 512 << 20


def test_as_many_windows_come_together_as_the_device_has_memory_for(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 768)
    monkeypatch.setattr(module, "_READERS", 3)
    monkeypatch.setattr(module, "_most_staged", lambda device: 1600)
    assert [some.windows for some in arriving(range(2, 10))] == [range(2, 8), range(8, 10)]


@pytest.mark.parametrize("taken", [1, 3])
def test_all_copies_are_waited_for_at_the_end_and_where_it_comes_early(monkeypatch, batches_of_2, taken):
    log = []

    class Watched(module._Batch):
        def launched(self):
            log.append("launched")

        def wait(self):
            log.append("wait")

    monkeypatch.setattr(module, "_Batch", Watched)
    windows = arriving(range(6))
    for _ in range(taken):
        next(windows)
        log.append("copied")
    assert next(windows, None) is None if taken == 3 else windows.close() is None
    assert log[-2:] == ["launched", "wait"]
    assert log.index("copied") < len(log) - 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_page_locked_memory_is_written_again_only_when_it_was_copied(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(module, "_STAGED_BYTES", 2 << 20)
    size, copies = 1 << 17, []

    def read(window, row):
        assert row.is_pinned()
        row.fill_(window)
        return "disk"

    device = torch.device("cuda")
    for some in arriving_windows(range(64), size, read, device):
        copies += some.data.clone().unbind(0)
    assert [int(one.float().mean()) for one in copies] == list(range(64))
