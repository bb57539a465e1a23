import threading

import pytest
import torch

from ragkit.kvcache import arriving_windows as module
from ragkit.kvcache.arriving_windows import arriving_windows

CPU = torch.device("cpu")


def numbered(window, allocate):
    piece = allocate(4)
    piece.fill_(window)
    return "disk", [piece]


def test_windows_come_in_order_a_batch_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 12)
    found = [(span, [int(pieces[0][0]) for _, pieces in batch]) for span, batch in arriving(range(2, 10))]
    assert found == [(range(2, 5), [2, 3, 4]), (range(5, 8), [5, 6, 7]), (range(8, 10), [8, 9])]
    assert list(arriving(range(3, 3))) == []


def test_one_batch_is_read_while_the_one_before_is_placed_and_no_more(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 8)
    began, more = set(), threading.Semaphore(0)

    def read(window, allocate):
        began.add(window)
        more.release()
        return numbered(window, allocate)

    windows = arriving_windows(range(8), 4, read, CPU)
    next(windows)
    for _ in range(4):
        assert more.acquire(timeout=10)
    assert began == {0, 1, 2, 3}
    windows.close()


def test_what_cannot_be_read_is_told_when_its_batch_comes(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_BYTES", 8)

    def read(window, allocate):
        if window == 5:
            raise OSError("gone")
        return numbered(window, allocate)

    seen = []
    with pytest.raises(OSError, match="gone"):
        seen.extend(span for span, _ in arriving_windows(range(8), 4, read, CPU))
    assert seen == [range(2), range(2, 4)]


@pytest.mark.parametrize(("windows", "batches"), [(3, [3 * (9 << 18) + 3 * 256]), (60, [63 << 20, 63 << 20])])
def test_batches_take_no_more_memory_than_windows_need(monkeypatch, windows, batches):
    taken = []

    class Counted(module._Batch):
        def __init__(self, device, nbytes):
            taken.append(nbytes)
            super().__init__(device, nbytes)

    monkeypatch.setattr(module, "_Batch", Counted)
    for _ in arriving_windows(range(windows), 2 << 20, numbered, CPU):
        pass
    assert taken == pytest.approx(batches, rel=0.001)
    assert max(taken) <= 64 << 20  # page-locked memory comes in powers of two


@pytest.mark.parametrize("taken", [1, 3])
def test_all_copies_are_waited_for_at_the_end_and_where_it_comes_early(monkeypatch, taken):
    monkeypatch.setattr(module, "_BATCH_BYTES", 8)
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
    size, copies = 1 << 18, []

    def read(window, allocate):
        piece = allocate(size)
        assert piece.is_pinned()
        return "disk", [piece.fill_(window)]

    device = torch.device("cuda")
    for _, batch in arriving_windows(range(64), size, read, device):
        copies += [pieces[0].to(device, non_blocking=True) for _, pieces in batch]
    assert [int(one.float().mean()) for one in copies] == list(range(64))


def arriving(windows):
    return arriving_windows(windows, 4, numbered, CPU)
