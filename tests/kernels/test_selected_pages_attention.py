import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.gather_pages import PageLists
from ragkit.kernels.launched import LaunchedKernel
from ragkit.kernels.merge_splits import MergeLaunch
from ragkit.kernels.page_scores import Pooling, page_scores
from ragkit.kernels.page_tile import page_tile
from ragkit.kernels.page_top_k import page_top_k
from ragkit.kernels.paged_decode_attention import HIDDEN, paged_decode_attention_torch
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kernels.selected_pages_attention import (
    MOST_PAIRS,
    launch_few_queries,
    selected_pages_attention,
    selected_pages_attention_torch,
)
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 32
PAGES, BLOCKS = 12, 15


def _int32(numbers, device):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _angles(positions, head_dim, device, factor=1.0):
    """Cosines and sines of a model, with the factor that YaRN puts on them."""
    frequencies = 100.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(positions, device=device).float(), frequencies)
    return guarded(angles.cos() * factor), guarded(angles.sin() * factor)


def _lists(kv_heads, listed, device, rng, *, per_head, mapped):
    """Ascending pages, other ones for each head; the first stand at zero as a whole, the others behind each other."""
    rows = kv_heads if per_head else 1
    pages = torch.stack(
        [torch.randperm(PAGES, device=device, generator=rng)[:listed].sort().values for _ in range(rows)]
    )
    pages = pages.int().view(rows, listed)
    positions = torch.arange(-2 * BLOCK, (listed - 2) * BLOCK, BLOCK, dtype=torch.int32, device=device)[None]
    if per_head:
        positions = positions + torch.arange(rows, dtype=torch.int32, device=device)[:, None] * (positions >= 0)
    blocks = torch.randperm(BLOCKS, device=device, generator=rng)[:PAGES].int() if mapped else None
    return PageLists(pages, positions.contiguous(), blocks)


def _inputs(tokens, listed, q_heads, kv_heads, head_dim, dtype, device, rng, *, per_head=True, mapped=True, spare=5):
    """Queries as a view over a fused projection, at the end of lists whose last `spare` rows nobody sees."""
    qkv = guarded(torch.randn(tokens, q_heads + 2, head_dim, device=device, generator=rng).to(dtype))
    qkv[:, q_heads:] = math.nan
    pools = [torch.randn(BLOCKS, BLOCK, kv_heads, head_dim, device=device, generator=rng).to(dtype) for _ in range(2)]
    lists = _lists(kv_heads, listed, device, rng, per_head=per_head, mapped=mapped)
    if spare:  # the unseen rows of each head's last page
        for head in range(kv_heads):
            page = int(lists.pages[head if per_head else 0, -1])
            block = int(lists.blocks[page]) if mapped else page
            for pool in pools:
                pool[block, BLOCK - spare :, head] = math.nan
    last_rows = torch.arange(tokens, dtype=torch.int32, device=device) + (listed * BLOCK - spare - tokens)
    tables = _angles(PAGES * BLOCK + kv_heads, head_dim, device)
    return [qkv[:, :q_heads], *(guarded(pool) for pool in pools), lists, last_rows, *tables]


def _as_codes(pools, bits):
    """Keys and values in codes that 16 rows, or 8 channels, share a scale of."""
    whole = [
        quantize_kv(pool.flatten(0, 1), bits=bits, token_group=rows, channel_group=channels)
        for pool, (rows, channels) in zip(pools, ((16, 1), (1, 8)), strict=True)
    ]
    return [QuantizedBlocks(*(part.unflatten(0, (BLOCKS, -1)).contiguous() for part in parts), bits) for parts in whole]


def _compare(inputs, reduced=4):
    scale = inputs[0].shape[-1] ** -0.5
    got = selected_pages_attention(*inputs, scale=scale, backend=Backend.TRITON)
    wide = [part.float() if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in inputs]
    assert_matches(got, selected_pages_attention_torch(*wide, scale=scale), reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("tokens", "listed"), [(1, 1), (1, 7), (5, 4)])
def test_matches_the_definition(tokens, listed, per_head, dtype, device, rng):
    _compare(_inputs(tokens, listed, 6, 2, 32, dtype, device, rng, per_head=per_head))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (20, 1)])
def test_matches_the_definition_for_every_head_size(head_dim, q_heads, kv_heads, device, rng):
    _compare(_inputs(1, 3, q_heads, kv_heads, head_dim, torch.float32, device, rng, mapped=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_head", [False, True])
def test_many_queries_match_the_definition(per_head, dtype, device, rng):
    inputs = _inputs(40, 6, 4, 2, 32, dtype, device, rng, per_head=per_head)
    assert MOST_PAIRS < 40 * 2
    _compare(inputs)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("head_dim", "dtype"), [(32, torch.float32), (80, torch.bfloat16)])
def test_codes_are_attended_to_as_the_numbers_they_stand_for(head_dim, dtype, bits, tokens, device, rng):
    inputs = _inputs(tokens, 4, 4, 2, head_dim, dtype, device, rng, spare=0)
    inputs[1:3] = _as_codes(inputs[1:3], bits)
    _compare(inputs)


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_turned_back_are_keys_turned_forth(dtype, bits, device, rng):
    inputs = _inputs(3, 5, 4, 2, 64, dtype, device, rng, spare=0)
    if bits:
        inputs[1:3] = _as_codes(inputs[1:3], bits)
    tile = page_tile(inputs[1], inputs[2], dtype, device, is_turned=False)
    both = [
        launch_few_queries(*inputs, scale=0.2, tile=tile._replace(turns_queries=turns_queries)).float()
        for turns_queries in (False, True)
    ]
    assert_matches(both[0].to(dtype), both[1], reduced=4)


def _tiled(inputs, **changes):
    """What the kernel of few queries gives, and what is defined."""
    is_turned = len(inputs[5]) == 1
    tile = page_tile(*inputs[1:3], inputs[0].dtype, inputs[0].device, is_turned=is_turned)._replace(**changes)
    wide = [part.float() if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in inputs]
    got = launch_few_queries(*inputs, scale=0.2, tile=tile)
    return got, selected_pages_attention_torch(*wide, scale=0.2)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("bits", "per_head"), [(0, True), (0, False), (4, True)])
def test_pages_that_are_looked_up_ahead_are_those_attended_to(bits, per_head, mapped, device, rng):
    spare = 0 if bits else 5
    inputs = _inputs(2, 7, 4, 2, 32, torch.float32, device, rng, per_head=per_head, mapped=mapped, spare=spare)
    if bits:
        inputs[1:3] = _as_codes(inputs[1:3], bits)
    assert_matches(*_tiled(inputs, looks_ahead=True), reduced=4)


@pytest.mark.parametrize("mapped", [False, True])
def test_what_the_list_says_behind_the_last_row_is_not_followed(mapped, device, rng):
    inputs = _inputs(1, 6, 4, 2, 32, torch.float32, device, rng, mapped=mapped, spare=0)
    inputs[4] = inputs[4] - 3 * BLOCK
    expected = _tiled(inputs)[1]
    pages = inputs[3].pages.clone()
    pages[:, 3:] = 1 << 30
    inputs[3] = inputs[3]._replace(pages=guarded(pages, fill=1 << 30))
    tile = page_tile(*inputs[1:3], torch.float32, device, is_turned=False)._replace(looks_ahead=True)
    assert_matches(launch_few_queries(*inputs, scale=0.2, tile=tile), expected, reduced=4)


@pytest.mark.parametrize("starts_early", [False, True])
@pytest.mark.parametrize("merge", list(MergeLaunch))
def test_whenever_the_merge_is_launched_it_merges_all_parts(merge, starts_early, device, rng):
    inputs = _inputs(1, 7, 6, 2, 32, torch.float32, device, rng)
    changes = {"merge": merge, "starts_early": starts_early, "merges_by_warp": starts_early}
    assert_matches(*_tiled(inputs, **changes), reduced=4)


@pytest.mark.parametrize("starts_early", [False, True])
@pytest.mark.parametrize("merge", list(MergeLaunch))
def test_kernels_that_are_launched_early_wait_and_no_others(merge, starts_early, device, rng, monkeypatch):
    launches = []
    for module in ("merge_splits", "selected_pages_attention"):
        monkeypatch.setattr(f"ragkit.kernels.{module}.can_launch_early", lambda device: True)
    monkeypatch.setattr(LaunchedKernel, "_launch", lambda self, grid, *given, **constants: launches.append(constants))
    _tiled(_inputs(1, 7, 6, 2, 32, torch.float32, device, rng), merge=merge, starts_early=starts_early)
    parts, merging = launches
    assert (parts["WAITS"], parts.get("launch_pdl", False)) == (starts_early, starts_early)
    assert (parts["MERGE_AT_START"], parts["MERGE_AT_END"]) == (merge == "at start", merge == "at end")
    assert (merging["WAITS"], merging.get("launch_pdl", False)) == (merge != "after", merge != "after")


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rows_that_are_turned_already_need_a_table_of_one_row(factor, bits, device, rng):
    inputs = _inputs(2, 4, 4, 2, 32, torch.float32, device, rng, spare=0)
    if bits:
        inputs[1:3] = _as_codes(inputs[1:3], bits)
    inputs[3] = inputs[3]._replace(positions=torch.full_like(inputs[3].positions, -1))
    inputs[5:] = _angles(1, 32, device, factor=factor)
    _compare(inputs)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_factor_on_the_angles_counts_once_a_key(tokens, device, rng):
    inputs = _inputs(tokens, 5, 4, 2, 32, torch.float32, device, rng)
    inputs[5:] = _angles(PAGES * BLOCK + 2, 32, device, factor=1.3)
    _compare(inputs)


@pytest.mark.parametrize("backend", list(Backend))
def test_one_list_of_positions_by_rank_is_paged_decode_attention(backend, device, rng):
    inputs = _inputs(1, 6, 4, 2, 32, torch.float32, device, rng, per_head=False)
    pages = inputs[3].pages
    starts = torch.arange(0, 6 * BLOCK, BLOCK, dtype=torch.int32, device=device)[None]
    inputs[3] = PageLists(pages, starts, inputs[3].blocks)
    got = selected_pages_attention(*inputs, scale=0.2, backend=backend)
    row = torch.arange(BLOCK, dtype=torch.int32, device=device)
    positions = starts[..., None] + row
    positions[positions > inputs[4]] = HIDDEN
    expected = paged_decode_attention_torch(
        inputs[0], inputs[1], inputs[2], inputs[3].blocks[pages.long()], positions, _int32([6], device),
        inputs[4].long(), *inputs[5:], scale=0.2,
    )  # fmt: skip
    assert_matches(got, expected, reduced=4)


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_pages_behind_the_last_row_are_not_attended_to(tokens, device, rng):
    inputs = _inputs(tokens, 6, 4, 2, 32, torch.float32, device, rng, spare=0)
    inputs[4] = inputs[4] - 3 * BLOCK
    before = selected_pages_attention(*inputs, scale=0.2, backend=Backend.TRITON)
    pages, positions, blocks = inputs[3]
    pages = pages.clone()
    pages[:, 3:] = 0
    inputs[3] = PageLists(pages, positions, blocks)
    assert torch.equal(selected_pages_attention(*inputs, scale=0.2, backend=Backend.TRITON), before)


@pytest.mark.parametrize("tokens", [4, 40])
def test_a_query_sees_no_row_behind_its_own(tokens, device, rng):
    inputs = _inputs(tokens, 5, 4, 2, 32, torch.float32, device, rng)
    whole = selected_pages_attention(*inputs, scale=0.5, backend=Backend.TRITON)
    inputs[0], inputs[4] = inputs[0][:2], inputs[4][:2]
    assert_matches(selected_pages_attention(*inputs, scale=0.5, backend=Backend.TRITON), whole[:2], reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
def test_no_queries_give_no_rows(backend, device, rng):
    inputs = _inputs(1, 3, 4, 2, 32, torch.float32, device, rng)
    inputs[0], inputs[4] = inputs[0][:0], inputs[4][:0]
    assert selected_pages_attention(*inputs, scale=1.0, backend=backend).shape == (0, 4, 32)


def test_inputs_that_do_not_fit_are_refused(device, rng):
    inputs = _inputs(3, 3, 4, 2, 32, torch.float32, device, rng)
    empty = PageLists(inputs[3].pages[:, :0], inputs[3].positions[:, :0])
    wrongs = [
        (0, inputs[0][..., :16], r"queries must be \(tokens, heads, 32\)"),
        (0, inputs[0][:, :3], "3 query heads cannot share 2 key heads"),
        (0, inputs[0].transpose(0, 1).contiguous().transpose(0, 1), "of queries must be contiguous"),
        (1, inputs[1][:4], "alike"),
        (3, empty, "need a page to attend to"),
        (4, inputs[4].long(), r"last_rows must be \(3,\) int32"),
        (4, inputs[4][:2], r"last_rows must be \(3,\) int32"),
    ]
    if device.type == "cpu":
        wrongs += [
            (4, inputs[4] + 10, "ascending rows below 96"),
            (4, inputs[4].flip(0).contiguous(), "ascending rows below 96"),
        ]
    for index, wrong, message in wrongs:
        with pytest.raises(KernelInputError, match=message):
            selected_pages_attention(*inputs[:index], wrong, *inputs[index + 1 :], scale=1.0)
    with pytest.raises(KernelInputError, match="scale must be above zero"):
        selected_pages_attention(*inputs, scale=0.0)


def _retrieve(queries, summaries, bounds, pools, blocks, last_rows, tables, backend):
    """One step over a document: score its pages, choose, attend."""
    scores = page_scores(
        queries, summaries, pooling=Pooling.VOTE, per_head=True, scale=0.2, bounds=bounds, backend=backend
    )
    pages, counts = page_top_k(scores, 6, bounds=bounds, keep_rest=True, backend=backend)
    starts = torch.arange(0, 6 * BLOCK, BLOCK, dtype=torch.int32, device=queries.device)[None]
    lists = PageLists(pages, starts, blocks)
    last = last_rows + (counts[:1] - 1) * BLOCK
    return selected_pages_attention(queries, *pools, lists, last, *tables, scale=0.2, backend=backend)


def _document(device, rng):
    pools = [torch.randn(BLOCKS, BLOCK, 2, 32, device=device, generator=rng) for _ in range(2)]
    blocks = torch.randperm(BLOCKS, device=device, generator=rng)[:PAGES].int()
    summaries = pools[0][blocks.long()].mean(dim=1, keepdim=True)
    return pools, blocks, summaries.contiguous(), _angles(PAGES * BLOCK, 32, device)


def test_scoring_choosing_and_attending_is_the_same_on_both_backends(device, rng):
    pools, blocks, summaries, tables = _document(device, rng)
    queries = torch.randn(1, 4, 32, device=device, generator=rng)
    arguments = (queries, summaries, _int32([1, 9, 11], device), pools, blocks, _int32([7], device), tables)
    assert_matches(_retrieve(*arguments, Backend.TRITON), _retrieve(*arguments, Backend.TORCH), reduced=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("merge", list(MergeLaunch))
def test_a_graph_keeps_early_launches_behind_what_they_wait_for(merge, device, rng):
    layers = [_inputs(1, 12, 8, 2, 64, torch.bfloat16, device, rng, spare=0) for _ in range(8)]
    changes = {"merge": merge, "starts_early": merge is MergeLaunch.AT_START, "looks_ahead": True}
    changes["merges_by_warp"] = True
    for inputs in layers:
        _tiled(inputs, **changes)
    graph = torch.cuda.CUDAGraph()
    tile = page_tile(*layers[0][1:3], torch.bfloat16, device, is_turned=False)._replace(**changes)
    with torch.cuda.graph(graph):
        outs = [launch_few_queries(*inputs, scale=0.2, tile=tile) for inputs in layers]
    for _ in range(5):
        for inputs in layers:
            inputs[0].copy_(torch.randn(inputs[0].shape, device=device, generator=rng))
        graph.replay()
        for inputs, out in zip(layers, outs, strict=True):
            assert_matches(out, _tiled(inputs)[1], reduced=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_one_graph_replays_steps_over_other_queries_and_a_longer_document(device, rng):
    pools, blocks, summaries, tables = _document(device, rng)
    queries, bounds, last = torch.zeros(1, 4, 32, device=device), _int32([1, 6, 8], device), _int32([3], device)
    arguments = (queries, summaries, bounds, pools, blocks, last, tables)
    for _ in range(2):
        _retrieve(*arguments, Backend.TRITON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _retrieve(*arguments, Backend.TRITON)
    for step in range(4):
        queries.copy_(torch.randn(1, 4, 32, device=device, generator=rng))
        bounds.copy_(_int32([1, 6 + step, 8 + step], device))
        last.copy_(_int32([3 + step], device))
        graph.replay()
        assert_matches(out, _retrieve(*arguments, Backend.TORCH), reduced=4)
