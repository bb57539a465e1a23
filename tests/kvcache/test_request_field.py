import pytest
import torch

from ragkit.errors import KVCacheError
from ragkit.kernels.paged_rows import visible_rows_torch
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_field import RequestField
from ragkit.kvcache.request_kv import RequestKV, pack_rows
from ragkit.models.model_config import RopeConfig

CPU = torch.device("cpu")


def _pool(dtype=torch.float32, block_size=32, heads=(1, 2, 3)):
    layout = KVLayout(tuple(LayerSpec(count, 4, RopeConfig()) for count in heads), dtype)
    return KVPool(layout, 8, CPU, block_size)


def test_a_field_is_a_vector_for_sixteen_rows_of_every_layer_but_the_first():
    field = RequestField(_pool(), 5)
    assert field.layer(0) is None
    for index, heads in ((1, 2), (2, 3)):
        for part in field.layer(index):
            assert part.shape == (5, 2, heads, 4)
            assert part.is_contiguous()
            assert not bool(part.any())
    assert field.nbytes == 5 * 2 * (2 + 3) * 4 * 2 * 4
    assert field.of_requests(0, 1) == (None, None)
    assert field.of_requests(2, 1)[0].shape == (1, 5, 2, 3, 4)
    assert RequestField(_pool(), 6).of_requests(1, 3)[1].shape == (3, 2, 2, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_requests_rows_are_those_that_paged_attention_sees(dtype):
    pool = _pool(dtype)
    rng = torch.Generator().manual_seed(0)
    for part in (*pool.keys, *pool.values):
        part.copy_(torch.randn(part.shape, generator=rng))
    blocks = pool.allocate(2)
    with RequestKV(pool) as kv:
        kv.append_private(9)
        kv.append_shared(blocks, 50)
        kv.reserve(60)
        kv.replace_unseen(torch.tensor([12, 30, 58]))
        kv.field = RequestField(pool, len(kv.block_ids) - 1)
        kv.num_tokens = 60
        for layer in (1, 2):
            for part in kv.field.layer(layer):
                part.copy_(torch.randn(part.shape, generator=rng))
        packed, angles = pack_rows([kv]), torch.zeros(64, 2)
        for layer in range(3):
            fields = [None, None]
            if layer:
                fields = [torch.cat((part, torch.zeros_like(part[:1]))) for part in kv.field.layer(layer)]
            at, keys, values = visible_rows_torch(
                pool.keys[layer], pool.values[layer], torch.tensor(kv.block_ids), kv.row_positions, 59,
                angles.cos(), angles.sin(), *fields,
            )  # fmt: skip
            got = kv.rows(layer, packed)
            for mine, seen in zip(got, (keys, values), strict=True):
                assert mine.dtype is dtype
                assert torch.equal(mine, seen[at.argsort()].to(dtype))


def test_blocks_that_cannot_be_cut_into_cells_are_refused():
    with pytest.raises(KVCacheError, match="a multiple of 16 rows, got 24"):
        RequestField(_pool(block_size=24), 1)
