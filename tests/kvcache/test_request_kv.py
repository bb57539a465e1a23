import pytest
import torch

from ragkit.errors import CacheCapacityError, KVCacheError
from ragkit.kernels.paged_decode_attention import HIDDEN
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV, pack_rows
from ragkit.models.model_config import RopeConfig


@pytest.fixture
def pool() -> KVPool:
    return KVPool(KVLayout((LayerSpec(1, 4, RopeConfig()),), torch.float32), 16, torch.device("cpu"))


def _with_chunk(pool: KVPool, rows: int) -> tuple[RequestKV, list[int]]:
    blocks = pool.allocate(pool.blocks_for(rows))
    request = RequestKV(pool)
    request.append_shared(blocks, rows)
    return request, blocks


def test_reserving_gives_every_position_a_row(pool):
    request = RequestKV(pool)
    request.reserve(100)
    assert len(request.block_ids) == 2
    assert request.row_positions.flatten().tolist() == list(range(128))


def test_reserving_what_is_there_already_changes_nothing(pool):
    request = RequestKV(pool)
    request.reserve(100)
    version = request.version
    request.reserve(128)
    assert (len(request.block_ids), request.version) == (2, version)


def test_a_reservation_that_does_not_fit_leaves_the_request_as_it_was(pool):
    request = RequestKV(pool)
    request.reserve(64)
    with pytest.raises(CacheCapacityError):
        request.reserve(17 * 64)
    assert len(request.block_ids) == 1
    assert pool.num_free == 15


def test_rows_reserved_ahead_are_given_back_and_reserved_again(pool):
    request, _ = _with_chunk(pool, 70)
    request.reserve(70 + 3 * 64)
    request.num_tokens = 75
    version = request.version
    assert request.give_back(76) == 2
    assert (request.num_reserved, pool.num_free) == (70 + 64, 13)
    assert (len(request.row_positions), request.version > version) == (3, True)
    assert request.give_back(0) == 0  # what is written stays
    request.reserve(200)
    assert pack_rows([request]).positions.tolist() == list(range(75))
    assert request.slots(70, 200).unique().numel() == 130


def test_blocks_that_others_stand_behind_are_not_given_back(pool):
    request, _ = _with_chunk(pool, 70)
    request.reserve(70 + 64)
    request.num_tokens = 70
    request.replace(torch.arange(3))
    assert request.give_back(70) == 0
    assert request.places().tolist()[:3] != [0, 1, 2]
    assert request.num_reserved == 134


def test_slots_follow_the_block_table(pool):
    pool.allocate(3)
    request = RequestKV(pool)
    request.reserve(70)
    first, second = request.block_ids
    assert request.slots(62, 66).tolist() == [first * 64 + 62, first * 64 + 63, second * 64, second * 64 + 1]


def test_slots_of_shared_rows_are_refused(pool):
    request, _ = _with_chunk(pool, 10)
    request.reserve(20)
    with pytest.raises(KVCacheError, match="private rows"):
        request.slots(9, 12)


def test_a_shared_chunk_hides_the_rows_behind_its_end(pool):
    request, _ = _with_chunk(pool, 70)
    assert request.row_positions[1, :8].tolist() == [64, 65, 66, 67, 68, 69, HIDDEN, HIDDEN]


def test_private_rows_go_on_where_the_shared_chunk_ends(pool):
    request, _ = _with_chunk(pool, 70)
    request.reserve(80)
    assert request.row_positions[2, :3].tolist() == [70, 71, 72]
    assert request.slots(70, 71).tolist() == [request.block_ids[2] * 64]


def test_the_same_chunk_can_stand_twice_and_in_two_requests(pool):
    blocks = pool.allocate(1)
    one, two = RequestKV(pool), RequestKV(pool)
    one.append_shared(blocks, 5)
    one.append_shared(blocks, 5)
    two.append_shared(blocks, 5)
    assert pool.references(blocks[0]) == 4
    assert one.row_positions[1, :5].tolist() == [5, 6, 7, 8, 9]
    one.release()
    two.release()
    assert pool.references(blocks[0]) == 1


def test_shared_blocks_after_private_rows_are_refused(pool):
    blocks = pool.allocate(1)
    request = RequestKV(pool)
    request.reserve(5)
    with pytest.raises(KVCacheError, match="shared blocks come before"):
        request.append_shared(blocks, 5)


def test_a_wrong_number_of_blocks_is_refused(pool):
    with pytest.raises(KVCacheError, match="65 rows take 2 blocks, got 1"):
        RequestKV(pool).append_shared(pool.allocate(1), 65)


def test_replaced_rows_are_private_and_their_originals_hidden(pool):
    request, blocks = _with_chunk(pool, 100)
    slots = request.replace(torch.tensor([3, 70]))
    assert request.row_positions[0, 3] == HIDDEN
    assert request.row_positions[1, 70 - 64] == HIDDEN
    own = request.block_ids[2]
    assert own not in blocks
    assert slots.tolist() == [own * 64, own * 64 + 1]
    assert request.row_positions[2, :3].tolist() == [3, 70, HIDDEN]


def test_replacing_again_keeps_the_private_row(pool):
    request, _ = _with_chunk(pool, 100)
    first = request.replace(torch.tensor([3]))
    assert request.replace(torch.tensor([4, 3]))[1] == first[0]


def test_replacing_does_not_touch_another_request_with_the_same_blocks(pool):
    request, blocks = _with_chunk(pool, 100)
    other = RequestKV(pool)
    other.append_shared(blocks, 100)
    request.replace(torch.tensor([3]))
    assert other.row_positions[0, 3] == 3


def test_a_row_of_the_own_tail_is_replaced_in_place(pool):
    request, _ = _with_chunk(pool, 10)
    request.reserve(20)
    assert request.replace(torch.tensor([12])).tolist() == request.slots(12, 13).tolist()


@pytest.mark.parametrize("positions", [[200], [3, 3]])
def test_positions_without_a_row_or_named_twice_are_refused(pool, positions):
    request, _ = _with_chunk(pool, 100)
    with pytest.raises(KVCacheError, match="distinct positions"):
        request.replace(torch.tensor(positions))


def test_every_position_keeps_exactly_one_row_after_many_replacements(pool):
    request, _ = _with_chunk(pool, 150)
    request.reserve(160)
    request.num_tokens = 160
    for seed in range(3):
        order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
        request.replace(order[:50])
    packed = pack_rows([request])
    assert packed.positions.tolist() == list(range(160))
    assert len(packed.slots.unique()) == 160


def test_packing_puts_requests_behind_each_other_without_unwritten_rows(pool):
    one, _ = _with_chunk(pool, 70)
    two = RequestKV(pool)
    two.reserve(64)
    two.num_tokens = 3
    packed = pack_rows([one, two])
    assert packed.cu_seqlens.tolist() == [0, 70, 73]
    assert packed.slots[70:].tolist() == two.slots(0, 3).tolist()


def test_packing_nothing_gives_empty_tensors():
    packed = pack_rows([])
    assert (packed.slots.numel(), packed.cu_seqlens.tolist()) == (0, [0])


def test_leaving_the_context_gives_all_blocks_back(pool):
    with RequestKV(pool) as request:
        request.reserve(300)
    request.release()
    assert pool.num_free == 16
    assert request.block_ids == []


def _listed(pool: KVPool) -> tuple[RequestKV, list[int]]:
    """A request of 30 private rows, a shared chunk of 100, and a tail."""
    blocks = pool.allocate(2)
    request = RequestKV(pool)
    request.append_private(30)
    request.append_shared(blocks, 100)
    request.reserve(140)
    return request, blocks


def test_private_rows_may_stand_before_shared_ones(pool):
    request, blocks = _listed(pool)
    first, *shared, tail = request.block_ids
    assert shared == blocks
    assert request.row_positions[0].tolist() == [*range(30), *[HIDDEN] * 34]
    assert request.row_positions[1:3].flatten().tolist() == [*range(30, 130), *[HIDDEN] * 28]
    assert request.row_positions[3, :10].tolist() == list(range(130, 140))
    assert request.slots_at(request.places()[[29, 30, 130]]).tolist() == [first * 64 + 29, blocks[0] * 64, tail * 64]
    assert request.num_reserved == 130 + 64
    with pytest.raises(KVCacheError, match="reserved already"):
        request.append_private(1)


def test_rows_replaced_unseen_stand_where_seen_ones_do(pool):
    chosen = torch.tensor([31, 64, *range(80, 129)])
    seen, _ = _listed(pool)
    slots = seen.replace(chosen)
    unseen, _ = _listed(pool)
    own = unseen.replace_unseen(chosen)
    unseen.reserve(200)  # entries behind them
    seen.reserve(200)
    assert torch.equal(seen.row_positions, unseen.row_positions)
    place = {block: entry for entry, block in enumerate(unseen.block_ids)}
    same = {block: entry for entry, block in enumerate(seen.block_ids)}
    assert [place[slot // 64] for slot in own.tolist()] == [same[slot // 64] for slot in slots.tolist()]
    assert (own % 64).tolist() == (slots % 64).tolist()
    # The prefix's block has 34 rows left, so that 51 take one block more.
    assert own[:34].tolist() == [unseen.block_ids[0] * 64 + row for row in range(30, 64)]
    assert len(unseen.block_ids) == 4 + 1 + 1


def test_the_table_on_a_device_knows_rows_that_the_host_has_not_looked_at(pool):
    request, _ = _listed(pool)
    chosen = torch.tensor([31, 64, 129])
    request.replace_unseen(chosen)
    before = request.places()
    table = request.on_device()
    assert table.num_entries.tolist() == [4]
    assert table.block_tables.tolist() == [request.block_ids]
    assert torch.equal(request.places(), before)
    assert torch.equal(table.row_positions[0], request.row_positions)
    assert torch.equal(request.on_device().row_positions, table.row_positions)
    assert table.row_positions.data_ptr() != request.row_positions.data_ptr()


def test_rows_that_find_no_block_are_not_replaced(pool):
    request, _ = _listed(pool)
    others = pool.allocate(pool.num_free)
    with pytest.raises(CacheCapacityError):
        request.replace_unseen(torch.arange(30, 130))
    pool.release(others)
    assert request.row_positions[1, 0] == 30
    assert len(request.block_ids) == 4


def test_a_request_knows_the_bytes_that_it_alone_takes(pool):
    request, blocks = _listed(pool)
    block_bytes = 64 * pool.layout.bytes_per_token
    assert request.private_bytes == 2 * block_bytes
    request.replace_unseen(torch.arange(40, 75))
    assert request.private_bytes == 3 * block_bytes
    request.release()
    assert request.private_bytes == 0
    pool.release(blocks)
    assert pool.num_free == 16


def test_a_released_request_forgets_what_it_replaced(pool):
    request, _ = _listed(pool)
    request.replace_unseen(torch.tensor([31]))
    request.release()
    request.reserve(100)
    assert request.row_positions.flatten().tolist() == list(range(128))
