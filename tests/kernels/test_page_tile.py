import pytest
import torch

from ragkit.kernels import page_tile as module
from ragkit.kernels.page_tile import PageTile, num_splits, page_tile
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks

GPU = torch.device("cuda")


def _pools(bits, rows=64, head_dim=128):
    pools = [torch.zeros(2, 64, 2, head_dim, dtype=torch.bfloat16) for _ in range(2)]
    if not bits:
        return pools
    groups = ((rows, 1), (1, 64))
    whole = [
        quantize_kv(pool.flatten(0, 1), bits=bits, token_group=tokens, channel_group=channels)
        for pool, (tokens, channels) in zip(pools, groups, strict=True)
    ]
    return [QuantizedBlocks(*(part.unflatten(0, (2, -1)) for part in parts), bits) for parts in whole]


@pytest.mark.parametrize(("is_turned", "head_dim", "rows"), [(True, 128, 64), (True, 256, 32), (False, 128, 32)])
def test_rows_that_need_no_angles_are_multiplied_64_at_once_if_heads_are_not_large(is_turned, head_dim, rows):
    assert page_tile(*_pools(0, head_dim=head_dim), torch.bfloat16, GPU, is_turned=is_turned).rows == rows


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_multiplied_at_once_share_their_scales(bits):
    assert page_tile(*_pools(bits, rows=16), torch.bfloat16, GPU, is_turned=True).rows == 16


@pytest.mark.parametrize(("programs", "listed", "splits"), [(8, 64, 32), (8, 1024, 32), (264, 50, 1), (1, 7, 7)])
def test_a_list_has_as_many_parts_as_programs_run_at_once(programs, listed, splits, monkeypatch):
    monkeypatch.setattr(module, "num_processors", lambda device: 132)
    assert num_splits(programs, listed, PageTile(32, 4, 3, 2, False), GPU) == splits
