import random

import pytest

from ragkit.config import PolicyName
from ragkit.errors import KVCacheError
from ragkit.kvcache.eviction import CostTimesFrequency, EvictionQueue, make_policy


def queue_of(name, **chunks):
    queue = EvictionQueue(make_policy(name))
    for key, (nbytes, cost, uses) in chunks.items():
        queue.add(key, nbytes, cost)
        for _ in range(uses - 1):
            queue.use(key)
    return queue


def anything(_):
    return True


def order(queue):
    return [key for _ in range(len(queue)) for key in queue.make_room(1, anything)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("lru", ["big", "cheap", "rare", "often"]),
        ("lfu", ["rare", "cheap", "big", "often"]),
        ("gdsf", ["cheap", "big", "rare", "often"]),
        ("cost", ["cheap", "big", "rare", "often"]),
    ],
)
def test_each_policy_has_its_order(policy, expected):
    queue = queue_of(policy, big=(1000, 10, 3), cheap=(100, 0.1, 2), rare=(100, 10, 1), often=(100, 10, 4))
    assert order(queue) == expected


def test_enough_leaves_and_no_more():
    queue = queue_of("lru", a=(10, 1, 1), b=(10, 1, 1), c=(10, 1, 1))
    assert queue.make_room(11, anything) == ["a", "b"]
    assert len(queue) == 1


def test_what_may_not_leave_stays_in_line():
    queue = queue_of("lru", a=(10, 1, 1), b=(10, 1, 1), c=(10, 1, 1))
    assert queue.make_room(5, lambda key: key != "a") == ["b"]
    assert queue.make_room(5, anything) == ["a"]


def test_nothing_leaves_where_that_would_not_be_enough():
    queue = queue_of("lru", a=(10, 1, 1), b=(10, 1, 1))
    assert queue.make_room(15, lambda key: key != "a") == []
    assert order(queue) == ["a", "b"]


@pytest.mark.parametrize("policy", PolicyName)
def test_what_was_removed_and_added_again_stands_in_line_once(policy):
    queue = queue_of(policy, cheap=(10, 1, 1), dear=(10, 9, 3))
    for _ in range(3):
        queue.remove("cheap")
        queue.add("cheap", 10, 1)
    assert sorted(queue.make_room(15, anything)) == ["cheap", "dear"]
    assert len(queue) == 0


def test_a_use_counts_half_after_a_half_life():
    queue = EvictionQueue(CostTimesFrequency(half_life=100))
    queue.add("old", 1, 1.0)
    for _ in range(9):
        queue.use("old")
    queue.add("other", 1, 1.0)
    for _ in range(500):
        queue.use("other")
    for name in ("new", "newer"):
        queue.add(name, 1, 1.0)
    assert order(queue)[0] == "old"  # ten uses, five half-lives ago, against one now


def test_gdsf_ages_old_favourites():
    queue = EvictionQueue(make_policy("gdsf"))
    queue.add("favourite", 1, 1.0)
    for _ in range(20):
        queue.use("favourite")
    left = set()
    for number in range(100):
        queue.add(number, 1, 1.0)
        queue.add(number + 0.5, 1, 1.0)
        left.update(queue.make_room(1, anything))
        left.update(queue.make_room(1, anything))
    assert "favourite" in left


@pytest.mark.parametrize("policy", ["cost", "gdsf", "lfu"])
def test_frequency_beats_recency_under_zipf(policy):
    def hits(name):
        source = random.Random(0)
        queue, found, held = EvictionQueue(make_policy(name)), 0, set()
        for _ in range(6000):
            key = min(int(source.paretovariate(0.8)), 2000)
            if key in held:
                found += 1
                queue.use(key)
                continue
            if len(held) == 100:
                held -= set(queue.make_room(1, anything))
            queue.add(key, 1, 1.0)
            held.add(key)
        return found

    assert hits(policy) > hits("lru")


def test_the_line_does_not_grow_with_uses():
    queue = queue_of("cost", a=(1, 1, 1), b=(1, 1, 1))
    for _ in range(5000):
        queue.use("a")
    assert len(queue._heap) < 100


def test_an_unknown_policy_is_refused():
    with pytest.raises(KVCacheError, match="no eviction policy 'fifo'; there are cost, gdsf"):
        make_policy("fifo")
    assert len({type(make_policy(name)) for name in PolicyName}) == 4
