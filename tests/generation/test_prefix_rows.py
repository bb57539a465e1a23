"""The rows of a prompt's first tokens: all layers at once, wherever the blocks lie."""

from __future__ import annotations

import pytest
import torch

from ragkit.generation.prefix_rows import write_prefix
from ragkit.kvcache.layout import KVLayout, LayerSpec
from ragkit.kvcache.pool import KVPool
from ragkit.models.model_config import RopeConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("blocks", [[3], [3, 4], [5, 1], [6, 2, 7, 0, 4, 1]])
@pytest.mark.parametrize("short", [0, 1, 15])
def test_every_layer_has_the_rows_and_no_other_row_changes(blocks, short):
    pool = KVPool(KVLayout((LayerSpec(2, 8, RopeConfig()),) * 3, torch.float32), 8, DEVICE, 16)
    for part in (*pool.keys, *pool.values):
        part.fill_(-7.0)
    slots = pool.rows_of(blocks)[: len(blocks) * 16 - short]
    prefix = [(torch.randn(len(slots), 2, 8, device=DEVICE), torch.randn(len(slots), 2, 8, device=DEVICE))] * 3
    write_prefix(pool, slots, prefix)
    for layer, pair in enumerate(prefix):
        for rows, wanted in zip((pool.keys[layer], pool.values[layer]), pair, strict=True):
            expected = torch.full((128, 2, 8), -7.0, device=DEVICE)
            expected[slots.to(DEVICE)] = wanted
            assert torch.equal(rows.flatten(0, 1), expected)


def test_a_prompt_that_begins_with_a_chunk_has_no_such_rows():
    pool = KVPool(KVLayout((LayerSpec(2, 8, RopeConfig()),), torch.float32), 2, DEVICE, 16)
    before = pool.keys[0].clone()
    empty = torch.empty((0, 2, 8), device=DEVICE)
    write_prefix(pool, torch.empty(0, dtype=torch.int64), [(empty, empty)])
    assert torch.equal(pool.keys[0].nan_to_num(), before.nan_to_num())
