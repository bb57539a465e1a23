import pytest
import torch

from ragkit.errors import CacheCapacityError, KVCacheError
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.pool import KVPool
from ragkit.models.model_config import RopeConfig

LAYOUT = KVLayout((LayerSpec(3, 8, RopeConfig()), LayerSpec(2, 16, RopeConfig())), torch.float32)


@pytest.fixture
def pool() -> KVPool:
    return KVPool(LAYOUT, 4, torch.device("cpu"))


def test_each_layer_has_blocks_of_its_own_shape(pool):
    assert [tuple(keys.shape) for keys in pool.keys] == [(4, 64, 3, 8), (4, 64, 2, 16)]
    assert [tuple(values.shape) for values in pool.values] == [(4, 64, 3, 8), (4, 64, 2, 16)]


def test_bytes_per_token_counts_keys_and_values_of_all_layers():
    assert LAYOUT.bytes_per_token == 2 * (3 * 8 + 2 * 16) * 4


def test_a_block_is_handed_out_once(pool):
    assert sorted(pool.allocate(3) + pool.allocate(1)) == [0, 1, 2, 3]


def test_asking_for_too_much_hands_out_nothing_and_says_the_numbers(pool):
    pool.allocate(3)
    with pytest.raises(CacheCapacityError, match=r"asked for 2 KV blocks of 64 tokens, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_a_block_is_free_when_its_last_holder_lets_go(pool):
    blocks = pool.allocate(2)
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.num_free == 2
    assert pool.references(blocks[0]) == 1
    pool.release(blocks)
    assert pool.num_free == 4


def test_releasing_a_free_block_is_an_error(pool):
    block = pool.allocate(1)
    pool.release(block)
    with pytest.raises(KVCacheError, match="not held"):
        pool.release(block)


def test_retaining_a_free_block_is_an_error(pool):
    with pytest.raises(KVCacheError, match="not held"):
        pool.retain([0])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_blocks_for_rounds_up(pool, tokens, blocks):
    assert pool.blocks_for(tokens) == blocks


def test_rows_are_read_by_slot(pool):
    pool.keys[1].copy_(torch.arange(4 * 64).view(4, 64, 1, 1).expand_as(pool.keys[1]))
    keys, _ = pool.rows(1, torch.tensor([200, 3]))
    assert keys[:, 0, 0].tolist() == [200.0, 3.0]


def test_blocks_that_another_request_takes_meanwhile_are_reclaimed_again(pool):
    cached = pool.allocate(pool.num_blocks)
    taken = []

    def reclaim(count):
        pool.release([cached.pop() for _ in range(count - pool.num_free)])
        free = pool.num_free
        if not taken:
            taken.extend(pool.allocate(1, reclaim=False))
        return free

    pool.reclaim = reclaim
    assert len(pool.allocate(2)) == 2
    assert len(taken) == 1
