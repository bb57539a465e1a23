import math

import pytest
import torch
from torch.nn import functional

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.paged_rows import FIELD_ROWS, HIDDEN
from ragkit.kernels.paged_selected_attention import (
    ordered_entries,
    paged_selected_attention,
    paged_selected_attention_torch,
)
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 64
NAMES = (
    "queries", "key_pool", "value_pool", "block_tables", "row_positions", "num_entries", "positions", "cu_queries",
    "cos", "sin",
)  # fmt: skip


def _inputs(requests, q_heads, kv_heads, head_dim, dtype, device, rng):
    """Requests of (rows, queries) each, in scattered blocks; rows behind a request's end are NaN and hidden."""
    entries = max(-(-rows // BLOCK) for rows, _ in requests) + 2
    blocks = len(requests) * entries
    pools = [torch.full((blocks, BLOCK, kv_heads, head_dim), math.nan, device=device, dtype=dtype) for _ in range(2)]
    tables = torch.randperm(blocks, device=device, generator=rng).int().view(-1, entries)
    row_positions = torch.full((len(requests), entries * BLOCK), HIDDEN, dtype=torch.int32, device=device)
    positions = []
    for index, (rows, queries) in enumerate(requests):
        row_positions[index, :rows] = torch.arange(rows, device=device)
        own = (tables[index].long().unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=device)).flatten()[:rows]
        for pool in pools:
            fresh = torch.randn(rows, kv_heads, head_dim, device=device, generator=rng)
            pool.flatten(0, 1)[own] = fresh.to(dtype)
        positions.append(torch.randperm(rows, device=device, generator=rng)[:queries].sort().values)
    counts = [queries for _, queries in requests]
    angles = torch.rand(max(rows for rows, _ in requests), head_dim // 2, device=device, generator=rng) * 6
    queries = torch.randn(sum(counts), 2 * q_heads, head_dim, device=device, generator=rng).to(dtype)
    tensors = (
        guarded(queries)[:, :q_heads], guarded(pools[0]), guarded(pools[1]), tables,
        row_positions.view(-1, entries, BLOCK),
        torch.tensor([-(-rows // BLOCK) for rows, _ in requests], dtype=torch.int32, device=device),
        guarded(torch.cat(positions).int(), 10**6),
        torch.tensor([0, *counts], device=device).cumsum(0).int(), guarded(angles.cos()), guarded(angles.sin()),
    )  # fmt: skip
    return dict(zip(NAMES, tensors, strict=True))


def _fields(inputs, rng):
    """A field of every entry's rows, for keys and for values; NaN behind the entries of a request."""
    requests, entries = inputs["block_tables"].shape
    _, block_size, kv_heads, head_dim = inputs["key_pool"].shape
    shape = (requests, entries, block_size // FIELD_ROWS, kv_heads, head_dim)
    for name in ("key_field", "value_field"):
        field = torch.randn(shape, device=rng.device, generator=rng).to(inputs["queries"].dtype)
        field[torch.arange(entries, device=rng.device) >= inputs["num_entries"].unsqueeze(1)] = math.nan
        inputs[name] = guarded(field)
    return inputs


def _attend(inputs, backend=Backend.TRITON):
    return paged_selected_attention(**inputs, scale=0.125, backend=backend)


def _compare(inputs):
    wide = {name: part.float() if part.is_floating_point() else part for name, part in inputs.items()}
    expected = paged_selected_attention_torch(**wide, scale=0.125)
    assert_matches(_attend(inputs), expected, reduced=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requests", [[(1, 1)], [(64, 3), (200, 40)], [(130, 16), (70, 0), (63, 63)]])
def test_matches_the_definition(requests, dtype, device, rng):
    _compare(_inputs(requests, 6, 2, 32, dtype, device, rng))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(2, 2), (9, 3), (8, 2), (20, 1)])
def test_matches_the_definition_for_every_head_size_and_group(head_dim, q_heads, kv_heads, device, rng):
    _compare(_inputs([(70, 5), (9, 2)], q_heads, kv_heads, head_dim, torch.float32, device, rng))


@pytest.mark.parametrize("requests", [[(40, 0), (40, 5)], [(40, 5), (40, 0)], [(40, 0), (40, 0), (40, 33), (40, 0)]])
def test_requests_without_queries_take_no_part(requests, device, rng):
    _compare(_inputs(requests, 4, 2, 32, torch.float32, device, rng))


def test_many_requests_of_different_length_share_a_launch(device, rng):
    requests = [(5 + 31 * index % 90, index % 4 + 1) for index in range(9)]
    _compare(_inputs(requests, 2, 2, 32, torch.float32, device, rng))


def test_few_queries_are_split_along_their_blocks_and_merged(device, rng):
    _compare(_inputs([(1000, 2)], 2, 1, 32, torch.float32, device, rng))


def test_a_part_of_the_blocks_that_a_query_does_not_see_counts_for_nothing(device, rng):
    inputs = _inputs([(1000, 2)], 2, 1, 32, torch.float32, device, rng)
    inputs["positions"] = torch.tensor([3, 999], device=device).int()
    _compare(inputs)


def test_entries_behind_a_request_s_own_are_ignored(device, rng):
    inputs = _inputs([(130, 20), (70, 10)], 4, 2, 32, torch.float32, device, rng)
    before = _attend(inputs)
    for request, count in enumerate(inputs["num_entries"].tolist()):
        inputs["row_positions"][request, count:] = 0  # their rows are NaN
    assert torch.equal(_attend(inputs), before)


@pytest.mark.parametrize("backend", list(Backend))
def test_all_rows_selected_is_dense_causal_attention(backend, device, rng):
    inputs = _inputs([(130, 130)], 6, 2, 32, torch.float32, device, rng)
    rows = (inputs["block_tables"][0].long().unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=device)).flatten()[:130]
    keys, values = (inputs[pool].flatten(0, 1)[rows] for pool in ("key_pool", "value_pool"))
    first, second = keys.chunk(2, dim=-1)
    cos, sin = inputs["cos"].unsqueeze(1), inputs["sin"].unsqueeze(1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    dense = functional.scaled_dot_product_attention(
        *(part.transpose(0, 1).unsqueeze(0) for part in (inputs["queries"], turned, values)),
        is_causal=True, scale=0.125, enable_gqa=True,
    )  # fmt: skip
    assert_matches(_attend(inputs, backend), dense.squeeze(0).transpose(0, 1), reduced=4)


def test_blocks_are_shared_by_requests_at_different_positions(device, rng):
    inputs = _inputs([(128, 20), (192, 20)], 4, 2, 32, torch.float32, device, rng)
    inputs["block_tables"][1, 1:3] = inputs["block_tables"][0, :2]  # the first request's rows, 64 positions later
    _compare(inputs)


@pytest.mark.parametrize("backend", list(Backend))
def test_a_hidden_row_is_replaced_by_the_row_that_stands_at_its_position(backend, device, rng):
    inputs = _inputs([(150, 40)], 4, 2, 32, torch.float32, device, rng)
    plain = {name: part.clone() for name, part in inputs.items()}
    own, spare = inputs["block_tables"][0, 0].long(), inputs["block_tables"][0, 3].long()
    fresh = torch.randn(2, 2, 32, device=device, generator=rng)
    plain["key_pool"][own, 10], plain["value_pool"][own, 10] = fresh  # overwritten in place
    inputs["key_pool"][spare, 3], inputs["value_pool"][spare, 3] = fresh  # or put beside it, the old row hidden
    inputs["row_positions"][0, 0, 10], inputs["row_positions"][0, 3, 3] = HIDDEN, 10
    inputs["num_entries"][0] = 4
    assert_matches(_attend(inputs, backend), paged_selected_attention_torch(**plain, scale=0.125), reduced=4)


def test_blocks_in_any_order_give_the_same_result(device, rng):
    inputs = _inputs([(256, 30)], 4, 2, 32, torch.float32, device, rng)
    straight = _attend(inputs)
    order = torch.tensor([2, 0, 3, 1, 4, 5], device=device)
    for name in ("block_tables", "row_positions"):
        inputs[name] = inputs[name][:, order].contiguous()
    assert_matches(_attend(inputs), straight, reduced=4)


def test_an_order_that_was_found_before_gives_the_same_bits(device, rng):
    inputs = _inputs([(200, 9), (130, 7)], 4, 2, 32, torch.float32, device, rng)
    order = ordered_entries(inputs["row_positions"], inputs["num_entries"])
    assert torch.equal(_attend(inputs | {"order": order}), _attend(inputs))
    with pytest.raises(KernelInputError, match=r"order must be two of \(2, 6\), contiguous"):
        _attend(inputs | {"order": (order[0], order[1][:1])})


def test_private_blocks_hold_rows_of_arbitrary_positions(device, rng):
    inputs = _inputs([(256, 60)], 4, 2, 32, torch.float32, device, rng)
    shuffled = torch.randperm(256, device=device, generator=rng).int()
    inputs["row_positions"][0, :4] = shuffled.view(4, BLOCK)
    _compare(inputs)


@pytest.mark.parametrize("backend", list(Backend))
def test_rows_after_the_last_query_are_not_read(backend, device, rng):
    inputs = _inputs([(192, 3)], 4, 2, 32, torch.float32, device, rng)
    inputs["positions"] = torch.tensor([5, 30, 69], device=device).int()
    before = _attend(inputs, backend)
    blocks = inputs["block_tables"][0].long()
    for pool in ("key_pool", "value_pool"):
        inputs[pool][blocks[1], 6:], inputs[pool][blocks[2]] = math.nan, math.nan  # positions 70 to 191
    assert torch.equal(_attend(inputs, backend), before)


@pytest.mark.parametrize("backend", list(Backend))
def test_a_query_does_not_see_rows_that_later_queries_do(backend, device, rng):
    inputs = _inputs([(192, 3)], 4, 2, 32, torch.float32, device, rng)
    inputs["positions"] = torch.tensor([5, 30, 69], device=device).int()
    before = _attend(inputs, backend)
    for pool, number in (("key_pool", 100.0), ("value_pool", -100.0)):
        inputs[pool][inputs["block_tables"][0, 0].long(), 31:] = number
    after = _attend(inputs, backend)
    assert_matches(after[:2], before[:2])
    assert bool((after[2] != before[2]).any())


@pytest.mark.parametrize("backend", list(Backend))
def test_a_query_that_sees_nothing_gives_zeros(backend, device, rng):
    inputs = _inputs([(100, 10), (100, 10)], 4, 2, 32, torch.float32, device, rng)
    inputs["row_positions"][0] = HIDDEN
    got = _attend(inputs, backend)
    assert torch.equal(got[:10], torch.zeros_like(got[:10]))
    assert bool((got[10:] != 0).any())


@pytest.mark.parametrize("backend", list(Backend))
def test_a_query_that_sees_nothing_beside_one_that_does_gives_zeros(backend, device, rng):
    inputs = _inputs([(100, 3)], 4, 2, 32, torch.float32, device, rng)
    inputs["row_positions"][0, 0, :50] = HIDDEN
    inputs["positions"] = torch.tensor([20, 49, 99], device=device).int()
    got = _attend(inputs, backend)
    assert torch.equal(got[:2], torch.zeros_like(got[:2]))
    assert bool((got[2] != 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_matches_the_definition_with_a_field(head_dim, dtype, device, rng):
    _compare(_fields(_inputs([(130, 20), (70, 5)], 6, 2, head_dim, dtype, device, rng), rng))


@pytest.mark.parametrize("backend", list(Backend))
def test_a_field_is_as_if_its_vectors_were_added_to_the_rows(backend, device, rng):
    inputs = _fields(_inputs([(150, 40), (64, 3)], 4, 2, 32, torch.float32, device, rng), rng)
    added = {name: part.clone() for name, part in inputs.items() if not name.endswith("field")}
    for request, count in enumerate(inputs["num_entries"].tolist()):
        blocks = inputs["block_tables"][request, :count].long()
        for pool, field in (("key_pool", "key_field"), ("value_pool", "value_field")):
            added[pool][blocks] += inputs[field][request, :count].repeat_interleave(FIELD_ROWS, dim=1)
    assert_matches(_attend(inputs, backend), paged_selected_attention_torch(**added, scale=0.125), reduced=4)


def test_a_shared_block_is_read_with_each_request_s_own_field(device, rng):
    inputs = _fields(_inputs([(100, 10), (100, 10)], 4, 2, 32, torch.float32, device, rng), rng)
    inputs["block_tables"][1] = inputs["block_tables"][0]
    inputs["queries"][10:], inputs["positions"][10:] = inputs["queries"][:10].clone(), inputs["positions"][:10].clone()
    _compare(inputs)
    got = _attend(inputs)
    assert bool((got[:10] != got[10:]).all())


@pytest.mark.parametrize("backend", list(Backend))
def test_no_queries_give_no_rows(backend, device, rng):
    inputs = _inputs([(20, 0)], 4, 2, 32, torch.float32, device, rng)
    assert _attend(inputs, backend).shape == (0, 4, 32)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("queries", lambda part: part.transpose(0, 1), "positions must be"),
        ("positions", lambda part: part.long(), "positions must be"),
        ("cu_queries", lambda part: part[:1], "cu_queries must be"),
        ("cu_queries", lambda part: part[[0, 1, 1]], "cu_queries must rise from 0 to 6"),
        ("value_pool", lambda part: part[..., :16], "pools must be"),
        ("row_positions", lambda part: part[..., :32], "tables must be of 2 requests"),
        ("num_entries", lambda part: part[:1], "tables must be of 2 requests"),
        ("cos", lambda part: part[:, :8], "cos and sin must be"),
        ("key_field", lambda part: part[:, :1], "a field must be"),
        ("key_field", lambda _: None, "given together"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name, change, message, rng):
    rng = torch.Generator().manual_seed(0)  # on the CPU, where values are looked at as well
    inputs = _fields(_inputs([(20, 3), (30, 3)], 4, 2, 32, torch.float32, torch.device("cpu"), rng), rng)
    inputs[name] = change(inputs[name])
    with pytest.raises(KernelInputError, match=message):
        _attend(inputs, Backend.TORCH)
