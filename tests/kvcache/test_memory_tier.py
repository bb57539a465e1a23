import dataclasses

import pytest
import torch
from kv_samples import key_of, ref_of

from ragkit.errors import KVCacheError
from ragkit.kvcache.chunk_kv import EncodedKV
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.page_locked import PageLockedMemory


def chunk(name, nbytes=100, cost=1.0):
    data = torch.full((nbytes,), len(str(name)), dtype=torch.uint8)
    return EncodedKV(ref_of(name), "codec", data, ((0, nbytes),), cost)


def tier_of(budget, policy="lru"):
    return MemoryTier("ram", budget, make_policy(policy))


def test_what_was_added_is_found_until_it_leaves():
    tier = tier_of(250)
    for name in "abc":
        tier.add(chunk(name)).release()
    assert tier.pin(ref_of("a")) is None
    with tier.pin(ref_of("b")) as pinned:
        assert torch.equal(pinned.encoded.data, chunk("b").data)
    assert (tier.bytes_used, len(tier), tier.evictions) == (200, 2, 1)


def test_a_pinned_chunk_never_leaves():
    tier = tier_of(200)
    with tier.add(chunk("a")):
        for name in "bcde":
            tier.add(chunk(name)).release()
        assert tier.holds(ref_of("a"))
    tier.add(chunk("f")).release()
    tier.add(chunk("g")).release()
    assert not tier.holds(ref_of("a"))


def test_a_chunk_pinned_twice_needs_two_releases():
    tier = tier_of(100)
    first, second = tier.add(chunk("a")), tier.pin(ref_of("a"))
    first.release()
    first.release()
    tier.add(chunk("b")).release()
    assert tier.holds(ref_of("a"))
    second.release()
    tier.add(chunk("b")).release()
    assert not tier.holds(ref_of("a"))


def test_without_room_a_chunk_is_handed_out_and_not_kept():
    tier = tier_of(100)
    with tier.add(chunk("a")), tier.add(chunk("b")) as pinned:
        assert pinned.encoded.nbytes == 100
        assert not tier.holds(ref_of("b"))
    assert tier.add(chunk("c", 101)).encoded.nbytes == 101
    assert tier.holds(ref_of("a"))  # what is too large throws nobody out
    assert tier.bytes_used == 100


def test_adding_twice_keeps_one():
    tier = tier_of(300)
    first, second = tier.add(chunk("a")), tier.add(chunk("a"))
    assert first.encoded is second.encoded
    assert tier.bytes_used == 100


def test_other_tokens_under_one_key_are_a_miss_and_replace():
    tier = tier_of(300)
    mine = tier.add(chunk("a"))
    ref = dataclasses.replace(ref_of("b"), key=key_of("a"))
    assert tier.pin(ref) is None
    assert tier.collisions == 1
    other = tier.add(dataclasses.replace(chunk("b", 50), ref=ref))
    assert other.encoded.ref.token_ids == ref.token_ids
    assert mine.encoded.ref.token_ids == ref_of("a").token_ids
    assert tier.bytes_used == 150  # the replaced one counts while it is pinned
    mine.release()
    assert tier.bytes_used == 50


def test_a_chunk_can_be_handed_to_another_chunk_of_the_same_text():
    tier = tier_of(300)
    tier.add(chunk("a")).release()
    tier.reown(ref_of("a"), "new")
    tier.reown(ref_of("b"), "new")  # not here
    tier.reown(ref_of("a"), "older")  # not the owner any more
    assert tier.refs() == [dataclasses.replace(ref_of("a"), chunk_id="new")]
    assert tier.holds(ref_of("a"))


def test_discarded_chunks_are_gone():
    tier = tier_of(300)
    pinned = tier.add(chunk("a"))
    tier.discard([key_of("a"), key_of("unknown")])
    assert tier.pin(ref_of("a")) is None
    assert tier.bytes_used == 100
    pinned.release()
    assert tier.bytes_used == 0


def test_a_negative_budget_is_refused():
    with pytest.raises(KVCacheError, match="budget of 0 bytes or more, got -1"):
        tier_of(-1)


def locked_tier(budget, slab=4096):
    memory = PageLockedMemory(budget, slab, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    return MemoryTier("ram", budget, make_policy("lru"), page_locked=memory), memory


def test_chunks_lie_in_page_locked_memory_whoever_made_them():
    tier, memory = locked_tier(8192)
    loaded = tier.allocate(1000)
    with tier.add(dataclasses.replace(chunk("a", 1000), data=loaded)) as pinned:
        assert pinned.encoded.data is loaded
    with tier.add(chunk("b", 1000)) as pinned:
        assert memory.owns(pinned.encoded.data)
        assert torch.equal(pinned.encoded.data, chunk("b", 1000).data)


def test_what_left_the_tier_keeps_its_bytes_while_it_is_used():
    tier, memory = locked_tier(8192)
    with tier.add(chunk("a", 4096)) as pinned:
        kept = pinned.encoded
    for name in ("bb", "ccc", "dddd", "eeeee", "ffffff"):
        tier.add(chunk(name, 4096)).release()
    assert not tier.holds(ref_of("a"))
    assert torch.equal(kept.data, chunk("a", 4096).data)
    assert memory.bytes_locked <= 8192 + 4096


def test_a_chunk_without_room_in_page_locked_memory_is_handed_out_all_the_same():
    tier, memory = locked_tier(4096)
    with tier.add(chunk("a", 20000)) as pinned:
        assert not memory.owns(pinned.encoded.data)
        assert pinned.encoded.nbytes == 20000
    assert len(tier) == 0
