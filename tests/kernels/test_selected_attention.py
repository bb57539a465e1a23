import math

import pytest
import torch
from torch.nn import functional

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.selected_attention import (
    AttentionTile,
    attention_tile,
    even_key_splits,
    launch_selected_attention,
    num_key_splits,
    selected_attention,
    selected_attention_torch,
)
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _chosen(tokens, rows, rng):
    """Ascending positions with gaps of any size."""
    return torch.randperm(rows, device=rng.device, generator=rng)[:tokens].sort().values.int()


def _inputs(positions, rows, q_heads, kv_heads, head_dim, dtype, device, rng):
    """Queries as a slice of fused projections, NaN rows around everything."""
    fused = torch.randn(len(positions), (q_heads + 2 * kv_heads) * head_dim, device=device, generator=rng).to(dtype)
    queries = guarded(fused).unflatten(1, (-1, head_dim))[:, :q_heads]
    keys, values = (
        guarded(torch.randn(rows, kv_heads, head_dim, device=device, generator=rng).to(dtype)) for _ in range(2)
    )
    return [queries, keys, values, guarded(positions, 10**6)]


def _compare(inputs):
    scale = inputs[0].shape[-1] ** -0.5
    got = selected_attention(*inputs, scale=scale, backend=Backend.TRITON)
    wide = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs]
    assert got.is_contiguous()
    assert got.dtype == inputs[0].dtype
    assert_matches(got, selected_attention_torch(*wide, scale=scale), reduced=4)


def _plain_attention(queries, keys, values, positions, scale):
    """The formula, word for word, in fp64."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(group, dim=1) for part in (keys, values))
    scores = torch.einsum("qhd,rhd->hqr", queries.double(), keys) * scale
    later = torch.arange(len(keys), device=keys.device) > positions.unsqueeze(1)
    return torch.einsum("hqr,rhd->qhd", scores.masked_fill(later, -math.inf).softmax(-1), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (1, 300), (15, 40), (16, 150), (70, 301)])
def test_matches_the_definition(tokens, rows, dtype, device, rng):
    _compare(_inputs(_chosen(tokens, rows, rng), rows, 6, 2, 64, dtype, device, rng))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(2, 2), (9, 3), (8, 2), (20, 1)])
def test_matches_the_definition_for_every_head_size_and_group(head_dim, q_heads, kv_heads, device, rng):
    _compare(_inputs(_chosen(10, 70, rng), 70, q_heads, kv_heads, head_dim, torch.float32, device, rng))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [80, 256])
def test_matches_the_definition_in_half_precision_for_head_sizes_with_tiles_of_their_own(dtype, head_dim, device, rng):
    _compare(_inputs(_chosen(12, 140, rng), 140, 4, 1, head_dim, dtype, device, rng))


@pytest.mark.parametrize("edge", [31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_matches_the_definition_at_the_edges_of_tiles(edge, device, rng):
    positions = torch.tensor([edge - 1, edge, edge + 1, edge + 40], device=device, dtype=torch.int32)
    _compare(_inputs(positions, edge + 41, 4, 2, 64, torch.float32, device, rng))


@pytest.mark.parametrize("positions", [[0], [0, 299], [0, 1, 2, 150, 298, 299], [299]])
def test_matches_the_definition_with_gaps_of_any_size(positions, device, rng):
    _compare(_inputs(torch.tensor(positions, device=device).int(), 300, 4, 2, 64, torch.float32, device, rng))


def test_scattered_and_contiguous_positions_mix(device, rng):
    positions = torch.cat((_chosen(20, 240, rng), torch.arange(240, 300, device=device).int()))
    _compare(_inputs(positions, 300, 4, 2, 64, torch.float32, device, rng))


def _rows_of_several_splits(device):
    tile = attention_tile(64, torch.float32, device)
    assert num_key_splits(1, 20, device) > 2
    return 20 * tile.rows - 3


@pytest.mark.parametrize("tokens", [1, 2, 15])
def test_few_queries_are_split_along_their_keys_and_merged(tokens, device, rng):
    rows = _rows_of_several_splits(device)
    _compare(_inputs(_chosen(tokens, rows, rng), rows, 3, 1, 64, torch.float32, device, rng))


def test_a_part_of_the_keys_that_a_query_does_not_see_counts_for_nothing(device, rng):
    rows = _rows_of_several_splits(device)
    _compare(_inputs(torch.tensor([0, rows - 1], device=device).int(), rows, 2, 1, 64, torch.float32, device, rng))


def test_work_that_is_even_is_split_as_rounds_and_merging_cost_least(monkeypatch):
    monkeypatch.setattr("ragkit.kernels.selected_attention.num_processors", lambda device: 132)
    gpu = torch.device("cuda")
    assert even_key_splits(128, 30, gpu) == 1  # a window: one round is nearly full
    assert even_key_splits(57, 30, gpu) == 2  # a window of a small model: half of a round
    assert even_key_splits(8, 30, gpu) == 6  # a question
    assert even_key_splits(1, 3, gpu) == 1  # too few rows to be split


@pytest.mark.parametrize("tokens", [2, 33])
def test_even_work_gives_what_uneven_work_does(tokens, device, rng):
    rows = _rows_of_several_splits(device)
    inputs = _inputs(torch.arange(rows - tokens, rows, device=device).int(), rows, 4, 2, 64, torch.float32, device, rng)
    expected = selected_attention(*inputs, scale=0.125, backend=Backend.TRITON)
    got = selected_attention(*inputs, scale=0.125, backend=Backend.TRITON, seen_by_all=rows - tokens)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "tile", [AttentionTile(16, 16, 4, 1), AttentionTile(64, 32, 4, 2), AttentionTile(64, 64, 4, 3)]
)
def test_how_the_work_is_cut_does_not_change_the_result(tile, device, rng):
    inputs = _inputs(_chosen(40, 200, rng), 200, 6, 2, 64, torch.float16, device, rng)
    got = launch_selected_attention(*inputs, scale=0.125, tile=tile)
    assert_matches(got, _plain_attention(*inputs, 0.125), reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
def test_all_rows_selected_is_dense_causal_attention(backend, device, rng):
    positions = torch.arange(150, device=device).int()
    queries, keys, values, _ = inputs = _inputs(positions, 150, 6, 2, 64, torch.float32, device, rng)
    dense = functional.scaled_dot_product_attention(
        *(part.transpose(0, 1).unsqueeze(0) for part in (queries, keys, values)), is_causal=True, enable_gqa=True
    )
    got = selected_attention(*inputs, scale=0.125, backend=backend)
    assert_matches(got, dense.squeeze(0).transpose(0, 1), reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
def test_rows_after_the_last_query_are_not_seen(backend, device, rng):
    inputs = _inputs(torch.tensor([3, 40, 77], device=device).int(), 200, 4, 2, 64, torch.float32, device, rng)
    before = selected_attention(*inputs, scale=0.125, backend=backend)
    inputs[1][78:], inputs[2][78:] = math.nan, math.nan
    assert torch.equal(selected_attention(*inputs, scale=0.125, backend=backend), before)


@pytest.mark.parametrize("backend", list(Backend))
def test_a_query_does_not_see_rows_that_later_queries_do(backend, device, rng):
    inputs = _inputs(torch.tensor([3, 40, 77], device=device).int(), 200, 4, 2, 64, torch.float32, device, rng)
    before = selected_attention(*inputs, scale=0.125, backend=backend)
    inputs[1][41:], inputs[2][41:] = 100.0, -100.0
    after = selected_attention(*inputs, scale=0.125, backend=backend)
    assert_matches(after[:2], before[:2])
    assert bool((after[2] != before[2]).all())


@pytest.mark.parametrize("backend", list(Backend))
def test_a_query_sees_its_own_row(backend, device, rng):
    inputs = _inputs(torch.tensor([5, 64, 90], device=device).int(), 100, 2, 2, 64, torch.float32, device, rng)
    inputs[1][inputs[3].long()] = inputs[0] * 50  # each query's own row has by far its largest score
    got = selected_attention(*inputs, scale=1.0, backend=backend)
    assert_matches(got, inputs[2][inputs[3].long()])


def test_the_definition_is_the_formula(device, rng):
    inputs = _inputs(_chosen(300, 700, rng), 700, 6, 2, 64, torch.float32, device, rng)
    assert_matches(selected_attention_torch(*inputs, scale=0.2), _plain_attention(*inputs, 0.2), reduced=4)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 64, 100])
def test_the_torch_path_works_in_the_type_of_its_inputs(tokens, dtype, amx, device, rng, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)  # decides how bf16 is multiplied
    inputs = _inputs(_chosen(tokens, 300, rng), 300, 6, 2, 64, dtype, device, rng)
    got = selected_attention(*inputs, scale=0.125, backend=Backend.TORCH)
    assert got.dtype == dtype
    assert_matches(got, _plain_attention(*inputs, 0.125), reduced=4)


def test_bf16_on_a_cpu_keeps_scores_apart_that_bf16_does_not(rng):
    queries, keys, values = torch.zeros(1, 1, 64), torch.zeros(2, 1, 64), torch.zeros(2, 1, 64)
    queries[..., :2], keys[0, 0, :2], keys[1, 0, :2] = 16.0, torch.tensor([16.0, 0.0]), torch.tensor([16.0, 0.0625])
    values[0, 0], values[1, 0] = 0.0, 1.0  # scores 256 and 257, which bf16 rounds to one number
    inputs = [part.bfloat16() for part in (queries, keys, values)]
    got = selected_attention(*inputs, torch.tensor([1]).int(), scale=1.0)
    assert abs(float(got[0, 0, 0]) - 0.7311) < 0.003


@pytest.mark.parametrize("last", [62, 63, 64, 127, 128])
def test_bf16_on_a_cpu_sees_rows_up_to_the_last_query_at_the_edges_of_its_padding(last):
    rng, positions = torch.Generator().manual_seed(0), torch.tensor([0, last // 2, last]).int()
    inputs = _inputs(positions, 200, 6, 2, 64, torch.bfloat16, rng.device, rng)
    inputs[1][last + 1 :], inputs[2][last + 1 :] = math.nan, math.nan
    got = selected_attention(*inputs, scale=0.125, backend=Backend.TORCH)
    seen = [inputs[0], inputs[1][: last + 1], inputs[2][: last + 1], inputs[3]]
    assert_matches(got, _plain_attention(*seen, 0.125), reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
def test_no_queries_give_no_rows(backend, device, rng):
    inputs = _inputs(_chosen(0, 20, rng), 20, 4, 2, 64, torch.float32, device, rng)
    assert selected_attention(*inputs, scale=1.0, backend=backend).shape == (0, 4, 64)


@pytest.mark.parametrize("positions", [[4, 3], [3, 3], [2, 20], [-1, 3]])
def test_positions_that_are_not_ascending_rows_are_refused_on_the_cpu(positions, rng):
    inputs = [torch.randn(2, 4, 64), *(torch.randn(20, 2, 64) for _ in range(2)), torch.tensor(positions).int()]
    with pytest.raises(KernelInputError, match="ascending rows below 20"):
        selected_attention(*inputs, scale=1.0)


def test_shapes_that_do_not_fit_are_refused(device, rng):
    queries, keys, values, positions = _inputs(_chosen(3, 20, rng), 20, 4, 2, 64, torch.float32, device, rng)
    with pytest.raises(KernelInputError, match="queries must be"):
        selected_attention(queries.transpose(0, 1), keys, values, positions, scale=1.0)
    with pytest.raises(KernelInputError, match="keys and values must be"):
        selected_attention(queries, keys, values[:-1], positions, scale=1.0)
    with pytest.raises(KernelInputError, match="must be contiguous"):
        selected_attention(queries, keys[::2], values[::2], positions, scale=1.0)
    shifted = torch.zeros(20 * 2 * 64 + 1, device=device)[1:].view(20, 2, 64)
    with pytest.raises(KernelInputError, match="multiple of 16 bytes"):
        selected_attention(queries, shifted, values, positions, scale=1.0)
    with pytest.raises(KernelInputError, match="share a type"):
        selected_attention(queries.half(), keys, values, positions, scale=1.0)
    wide = torch.zeros(20, 3, 64, device=device)
    with pytest.raises(KernelInputError, match="4 query heads cannot share 3"):
        selected_attention(queries, wide, wide, positions, scale=1.0)
    with pytest.raises(KernelInputError, match=r"positions must be \(3,\) int32"):
        selected_attention(queries, keys, values, positions.long(), scale=1.0)
    with pytest.raises(KernelInputError, match="above zero"):
        selected_attention(queries, keys, values, positions, scale=0.0)
