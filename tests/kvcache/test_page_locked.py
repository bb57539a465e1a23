import gc
import random
import threading

import pytest
import torch

from ragkit.errors import KVCacheError
from ragkit.kvcache.page_locked import PageLockedMemory

PLAIN = lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)  # noqa: E731


def memory_of(budget, slab=1 << 16):
    return PageLockedMemory(budget, slab, PLAIN)


def test_pieces_do_not_overlap_and_keep_what_is_written():
    memory = memory_of(1 << 18)
    pieces = [memory.allocate(size) for size in (1, 255, 256, 257, 5000, 65536)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert [piece.numel() for piece in pieces] == [1, 255, 256, 257, 5000, 65536]
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))
    assert all(piece.data_ptr() % 16 == 0 and memory.owns(piece) for piece in pieces)


def test_a_piece_is_free_when_its_last_view_is_gone():
    memory = memory_of(1 << 16)
    piece = memory.allocate(1000)
    address, free = piece.data_ptr(), memory.bytes_free
    view = piece[10:20].view(torch.int16)
    del piece
    gc.collect()
    assert memory.bytes_free == free
    del view
    assert memory.bytes_free == free + 1024
    assert memory.allocate(1000).data_ptr() == address


def test_neighbouring_gaps_become_one():
    memory = memory_of(1 << 16, 1 << 16)
    pieces = [memory.allocate(1 << 14) for _ in range(4)]
    del pieces[2], pieces[0]  # the first and the third
    assert memory.bytes_free == 1 << 15
    del pieces[0]  # the one between them
    whole = memory.allocate(3 << 14)
    assert whole is not None
    assert memory.bytes_locked == 1 << 16


def test_slabs_are_added_up_to_one_more_than_the_budget_needs(caplog):
    memory = memory_of(2 << 16)
    pieces = [memory.allocate(1 << 16) for _ in range(4)]
    assert [piece is not None for piece in pieces] == [True, True, True, False]
    assert memory.bytes_locked == 3 << 16
    assert memory.allocate(1 << 16) is None
    assert caplog.text.count("no page-locked memory is left") == 1


def test_a_piece_larger_than_a_slab_has_a_slab_of_its_own():
    memory = memory_of(1 << 20)
    assert memory.allocate(3 << 16).numel() == 3 << 16
    assert memory.allocate(10 << 20) is None


def test_memory_stays_while_a_piece_is_used_although_its_owner_is_gone():
    piece = memory_of(1 << 16).allocate(100)
    piece.fill_(7)
    gc.collect()
    torch.empty(1 << 20).fill_(1.0)
    assert bool((piece == 7).all())


def test_nothing_is_locked_for_nothing():
    memory = memory_of(0)
    assert memory.allocate(0).numel() == 0
    assert memory.bytes_locked == 0
    assert not memory.owns(torch.empty(4, dtype=torch.uint8))
    with pytest.raises(KVCacheError, match="cannot be had"):
        memory_of(-1)


def test_threads_share_it():
    memory = memory_of(1 << 20)
    wrong = []

    def work(seed):
        chance, held = random.Random(seed), []
        for _ in range(300):
            piece = memory.allocate(chance.randrange(1, 9000))
            if piece is not None:
                piece.fill_(seed)
                held.append(piece)
            if len(held) > 8:
                gone = held.pop(chance.randrange(len(held)))
                if not bool((gone == seed).all()):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert memory.bytes_free == memory.bytes_locked


def test_where_the_system_locks_no_more_memory_there_is_none_and_it_is_asked_once(caplog):
    asked = []

    def refuses(nbytes):
        asked.append(nbytes)
        raise RuntimeError("CUDA error: out of memory")

    memory = PageLockedMemory(1 << 18, 1 << 16, refuses)
    assert memory.allocate(1000) is None
    assert memory.allocate(1000) is None
    assert asked == [1 << 16]
    assert "the system gives no 65536 bytes of page-locked memory" in caplog.text
