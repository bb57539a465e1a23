import pytest
import torch

from ragkit.errors import CacheCapacityError
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.page_cache import PageCache
from ragkit.models.model_config import RopeConfig

LAYOUT = KVLayout((LayerSpec(1, 8, RopeConfig()),) * 2, torch.float32)


def _cache(pages=3):
    return PageCache(LAYOUT, 8, pages, 0, torch.device("cpu"))


def _rows(*numbers):
    return (torch.tensor(numbers).float().view(-1, 1, 1, 1).expand(-1, 8, 1, 8),) * 2


def test_pages_are_found_in_the_blocks_that_hold_their_rows():
    cache = _cache()
    cache.put(1, [7, 4], _rows(7.0, 4.0))
    blocks = cache.blocks(1, [4, 7])
    assert cache.pool.keys[1][blocks][:, 0, 0, 0].tolist() == [4.0, 7.0]
    assert cache.pool.values[1][blocks][:, 0, 0, 0].tolist() == [4.0, 7.0]


def test_layers_keep_pages_of_their_own():
    cache = _cache()
    cache.put(0, [1, 2, 3], _rows(1.0, 2.0, 3.0))
    assert cache.missing(1, [1, 2]) == [1, 2]
    assert cache.missing(0, [1, 2]) == []
    assert (cache.hits, cache.misses) == (2, 2)


def test_the_page_that_was_used_longest_ago_leaves_its_block_to_the_next():
    cache = _cache()
    cache.put(0, [1, 2, 3], _rows(1.0, 2.0, 3.0))
    assert cache.missing(0, [1, 9]) == [9]
    cache.put(0, [9], _rows(9.0))
    assert [cache.holds(0, page) for page in (1, 2, 3, 9)] == [True, False, True, True]
    assert cache.pool.keys[0][cache.blocks(0, [1, 9])][:, 0, 0, 0].tolist() == [1.0, 9.0]


def test_a_page_that_is_discarded_gives_its_block_back():
    cache = _cache()
    cache.put(0, [1, 2, 3], _rows(1.0, 2.0, 3.0))
    cache.discard([2, 5])
    cache.put(0, [6], _rows(6.0))
    assert [cache.holds(0, page) for page in (1, 2, 3, 6)] == [True, False, True, True]


def test_more_pages_than_there_are_blocks_are_refused_with_the_numbers():
    with pytest.raises(CacheCapacityError, match="4 pages are attended to at once, and each layer keeps 3 decoded"):
        _cache().missing(0, [1, 2, 3, 4])
