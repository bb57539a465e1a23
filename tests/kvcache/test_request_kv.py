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
