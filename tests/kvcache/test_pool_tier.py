import dataclasses

import pytest
import torch
from kv_samples import LAYOUT, chunk_of, key_of, ref_of

from ragkit.errors import CacheCapacityError, KVCacheError
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.pool_tier import DraftBytes, PoolCandidate, PoolTier
from ragkit.kvcache.request_kv import RequestKV, pack_rows


@pytest.fixture
def pool():
    return KVPool(LAYOUT, 8, torch.device("cpu"), block_size=16)


def tier_of(pool, max_blocks=8):
    return PoolTier(pool, max_blocks, make_policy("lru"))


def add(tier, name, tokens=20):
    ref = ref_of(name, tokens)
    return tier.add(chunk_of(ref), ref)


def test_a_request_reads_the_rows_of_the_chunk(pool):
    tier = tier_of(pool)
    add(tier, "other").release()
    add(tier, "a", 40).release()
    with tier.pin(ref_of("a", 40)) as blocks, RequestKV(pool) as request:
        request.append_shared(blocks.block_ids, blocks.num_tokens)
        slots = pack_rows([request]).slots
        for layer, (keys, values) in enumerate(chunk_of(ref_of("a", 40)).layers):
            got = pool.rows(layer, slots)
            assert torch.equal(got[0], keys)
            assert torch.equal(got[1], values)


def test_the_tier_stays_within_its_blocks_and_the_pool_gets_them_back(pool):
    tier = tier_of(pool, 4)
    for name in "abc":
        add(tier, name).release()
    assert tier.pin(ref_of("a")) is None
    assert pool.num_free == 4
    assert tier.bytes_used == 4 * 16 * LAYOUT.bytes_per_token
    assert tier.give_back(7) == 8  # a chunk takes two blocks
    assert tier.bytes_used == 0


def test_blocks_in_use_stay(pool):
    tier = tier_of(pool, 2)
    with add(tier, "a") as blocks:
        assert add(tier, "b") is None
        assert tier.give_back(8) == 6
        assert pool.references(blocks.block_ids[0]) == 2
    assert pool.references(blocks.block_ids[0]) == 1
    blocks.release()
    assert add(tier, "b") is not None


def test_rows_of_a_request_outlive_their_eviction(pool):
    tier = tier_of(pool, 2)
    request = RequestKV(pool)
    with add(tier, "a") as blocks:
        request.append_shared(blocks.block_ids, blocks.num_tokens)
    add(tier, "b").release()
    keys, _ = pool.rows(0, pack_rows([request]).slots)
    assert torch.equal(keys, chunk_of(ref_of("a")).layers[0][0])
    request.release()
    assert pool.num_free == 6


def test_a_full_pool_is_no_error(pool):
    tier = tier_of(pool)
    blocks = pool.allocate(7)
    assert add(tier, "a") is None
    pool.release(blocks)
    assert add(tier, "a") is not None


def test_other_tokens_under_one_key_replace(pool):
    tier = tier_of(pool)
    mine = add(tier, "a")
    ref = dataclasses.replace(ref_of("b"), key=key_of("a"))
    assert tier.pin(ref) is None
    other = tier.add(chunk_of(ref), ref)
    assert set(other.block_ids).isdisjoint(mine.block_ids)
    mine.release()
    other.release()
    assert pool.num_free == 6
    assert tier.pin(ref_of("a")) is None


def test_a_chunk_under_a_wrong_name_is_refused(pool):
    with pytest.raises(KVCacheError, match="cannot be kept as that of"):
        tier_of(pool).add(chunk_of(ref_of("a")), ref_of("b"))
    with pytest.raises(KVCacheError, match="does not fit a pool of 8"):
        tier_of(pool, 9)


def writer(pool, refs, calls):
    def write(kept, slots):
        calls.append(list(kept))
        chunks = [chunk_of(refs[index]) for index in kept]
        for layer in range(LAYOUT.num_layers):
            for side, parts in enumerate((pool.keys, pool.values)):
                parts[layer].flatten(0, 1)[slots] = torch.cat([chunk.layers[layer][side] for chunk in chunks])

    return write


def test_several_chunks_are_written_at_once_and_only_those_that_fit_and_are_new(pool):
    tier, calls = tier_of(pool, 6), []
    add(tier, "b").release()
    held = tier.pin(ref_of("b"))
    refs = [ref_of(name, tokens) for name, tokens in (("a", 33), ("b", 20), ("c", 40), ("d", 16))]
    assert tier.add_all([PoolCandidate(ref) for ref in refs], writer(pool, refs, calls)) == 2
    assert calls == [[0, 3]]  # "b" was there, "c" would need two more blocks than are left
    for ref in (refs[0], refs[3]):
        with tier.pin(ref) as blocks, RequestKV(pool) as request:
            request.append_shared(blocks.block_ids, blocks.num_tokens)
            assert torch.equal(pool.rows(1, pack_rows([request]).slots)[1], chunk_of(ref).layers[1][1])
    held.release()


def test_chunks_of_one_call_do_not_make_room_for_one_another(pool):
    tier, calls = tier_of(pool, 4), []
    add(tier, "old").release()
    refs = [ref_of(name) for name in "abc"]
    assert tier.add_all([PoolCandidate(ref) for ref in refs], writer(pool, refs, calls)) == 2
    assert [tier.pin(ref) is not None for ref in (ref_of("old"), *refs)] == [False, True, True, False]


def test_a_failed_write_leaves_nothing_behind(pool):
    tier = tier_of(pool)

    def fail(kept, slots):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        tier.add_all([PoolCandidate(ref_of("a"))], fail)
    assert tier.pin(ref_of("a")) is None
    assert (pool.num_free, tier.bytes_used) == (8, 0)


def test_the_draft_of_a_chunk_stays_with_it_and_counts(pool):
    tier = tier_of(pool, 2)
    draft = DraftBytes(torch.arange(100, dtype=torch.uint8), ((0, 40), (64, 100)))
    refs = [ref_of("a")]
    tier.add_all([PoolCandidate(refs[0], 1.0, lambda: draft)], writer(pool, refs, []))
    with tier.pin(refs[0]) as blocks:
        assert blocks.draft is draft
        assert blocks.nbytes == 20 * LAYOUT.bytes_per_token
    assert tier.bytes_used == 2 * 16 * LAYOUT.bytes_per_token + 100
    add(tier, "b").release()
    assert tier.bytes_used == 2 * 16 * LAYOUT.bytes_per_token


def test_blocks_and_drafts_together_stay_within_the_budget(pool):
    block = 16 * LAYOUT.bytes_per_token
    tier = PoolTier(pool, 8, make_policy("lru"), budget_bytes=6 * block)
    draft = DraftBytes(torch.zeros(block // 2, dtype=torch.uint8), ((0, block // 2),))
    refs = [ref_of(name) for name in "abcd"]

    def drafted(*which):
        return [PoolCandidate(refs[index], 1.0, lambda: draft, block // 2) for index in which]

    assert tier.add_all(drafted(0, 1, 2), writer(pool, refs[:3], [])) == 2  # five blocks' bytes with their drafts
    assert tier.bytes_used == 5 * block
    assert tier.add_all(drafted(3), writer(pool, refs[3:], [])) == 1
    assert [tier.holds(ref) for ref in refs] == [False, True, False, True]
    assert tier.bytes_used == 5 * block
    large = [PoolCandidate(ref_of("e"), 1.0, lambda: draft, 6 * block)]
    assert tier.add_all(large, writer(pool, [ref_of("e")], [])) == 0  # nobody leaves for what cannot fit
    assert [tier.holds(ref) for ref in refs] == [False, True, False, True]
    add(tier, "f", 16).release()  # the block that is left
    assert tier.bytes_used == 6 * block


def test_a_request_that_needs_blocks_gets_those_of_unused_chunks(pool):
    tier = tier_of(pool)
    for name in "abc":
        add(tier, name).release()
    with RequestKV(pool) as request, tier.pin(ref_of("c")):
        request.reserve(16 * 5)
        assert [tier.pin(ref_of(name)) is not None for name in "abc"] == [False, False, True]
        with pytest.raises(CacheCapacityError, match="asked for 3 KV blocks"):
            request.reserve(16 * 8)


def test_forgotten_and_handed_on_chunks(pool):
    tier = tier_of(pool)
    for name in "ab":
        add(tier, name).release()
    assert tier.refs() == [ref_of("a"), ref_of("b")]
    tier.reown(ref_of("b"), "heir")
    tier.discard([key_of("a"), key_of("x")])
    assert [ref.chunk_id for ref in tier.refs()] == ["heir"]
    assert pool.num_free == 6


def test_a_closed_tier_takes_no_blocks_any_more(pool):
    tier = tier_of(pool)
    tier.close()
    assert tier.add(chunk_of(ref_of("a")), ref_of("a")) is None
    assert pool.num_free == 8


def test_closing_a_tier_leaves_the_pool_to_a_later_one(pool):
    earlier, later = tier_of(pool), tier_of(pool)
    add(later, "a").release()
    earlier.close()
    assert len(pool.allocate(8)) == 8


def test_chunks_pinned_together_are_held_once_for_each_time_they_are_listed_and_let_go_once(pool):
    tier = tier_of(pool)
    for name in "ab":
        add(tier, name).release()
    pins = tier.pin_all([ref_of("a"), ref_of("nowhere"), ref_of("b"), ref_of("a")])
    assert pins[1] is None
    found = [pin for pin in pins if pin is not None]
    assert [pool.references(pin.block_ids[0]) for pin in found] == [3, 2, 3]
    assert tier.give_back(8) == 4
    found[0].release()
    for _ in range(2):
        tier.release_all(found)
        assert [pool.references(pin.block_ids[0]) for pin in found] == [1, 1, 1]
    assert tier.give_back(8) == 8


def test_pinning_nothing_pins_nothing(pool):
    assert tier_of(pool).pin_all([]) == []
