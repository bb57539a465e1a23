import torch

from ragkit.kvcache.page_memory import PageMemory


def _piece(nbytes=100):
    return torch.zeros((1, nbytes), dtype=torch.uint8)


def test_the_piece_that_was_used_longest_ago_leaves():
    memory = PageMemory(300)
    for window in range(3):
        memory.put(0, window, _piece())
    assert memory.get(0, 0) is not None
    memory.put(0, 3, _piece())
    assert [memory.holds(0, window) for window in range(4)] == [True, False, True, True]
    assert memory.bytes_used == 300
    assert memory.get(0, 1) is None
    assert (memory.hits, memory.misses) == (1, 1)


def test_what_is_held_stays_beyond_the_budget_until_it_is_let_go():
    memory = PageMemory(250)
    memory.hold(0)
    for window in range(4):
        for layer in range(2):
            memory.put(layer, window, _piece())
    assert memory.holds(0, 0)
    assert memory.holds(1, 0)
    assert memory.bytes_used == 200
    memory.put(0, 4, _piece(200))
    assert memory.bytes_used == 200  # the new piece does not fit beside what is held
    memory.let_go(range(1))
    memory.put(0, 5, _piece(200))
    assert (memory.bytes_used, memory.holds(0, 5)) == (200, True)


def test_a_piece_that_comes_again_counts_once():
    memory = PageMemory(300)
    memory.put(0, 0, _piece())
    memory.put(0, 0, _piece(120))
    assert memory.bytes_used == 120
    memory.discard(0)
    assert memory.bytes_used == 0
