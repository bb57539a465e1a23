import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.launched import LaunchedKernel
from ragkit.kernels.merge_splits import MergeLaunch
from ragkit.kernels.paged_decode_attention import (
    HIDDEN,
    DecodeTile,
    launch_paged_decode_attention,
    paged_decode_attention,
    paged_decode_attention_torch,
)
from ragkit.kernels.paged_rows import FIELD_ROWS, entry_bases
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 64


def _inputs(lengths, q_heads, kv_heads, head_dim, dtype, device, rng):
    """Requests of `lengths` rows in scattered blocks; rows behind a request's end are NaN and hidden."""
    requests, entries = len(lengths), max(-(-length // BLOCK) for length in lengths) + 1
    blocks = requests * entries
    pools = [torch.full((blocks, BLOCK, kv_heads, head_dim), math.nan, device=device, dtype=dtype) for _ in range(2)]
    tables = torch.randperm(blocks, device=device, generator=rng).int().view(requests, entries)
    positions = torch.full((requests, entries * BLOCK), HIDDEN, dtype=torch.int32, device=device)
    for index, length in enumerate(lengths):
        positions[index, :length] = torch.arange(length, device=device)
        rows = tables[index].long().repeat_interleave(BLOCK) * BLOCK + torch.arange(BLOCK, device=device).repeat(
            entries
        )
        for pool in pools:
            fresh = torch.randn(length, kv_heads, head_dim, device=device, generator=rng)
            pool.flatten(0, 1)[rows[:length]] = fresh.to(dtype)
    counts = torch.tensor([-(-length // BLOCK) for length in lengths], dtype=torch.int32, device=device)
    queries = torch.randn(requests, q_heads, head_dim, device=device, generator=rng).to(dtype)
    angles = torch.rand(max(*lengths, 1), head_dim // 2, device=device, generator=rng) * 6
    last = torch.tensor([max(length - 1, 0) for length in lengths], device=device)
    return [
        guarded(queries), guarded(pools[0]), guarded(pools[1]), tables, positions.view(requests, entries, BLOCK),
        counts, last, guarded(angles.cos()), guarded(angles.sin()),
    ]  # fmt: skip


def _fields(inputs, rng):
    """A field of every entry's rows, for keys and for values; NaN behind the entries of a request."""
    _, block_size, kv_heads, head_dim = inputs[1].shape
    fields = []
    for _ in range(2):
        shape = (*inputs[3].shape, block_size // FIELD_ROWS, kv_heads, head_dim)
        field = torch.randn(shape, device=rng.device, generator=rng).to(inputs[0].dtype)
        field[torch.arange(shape[1], device=rng.device) >= inputs[5].unsqueeze(1)] = math.nan
        fields.append(guarded(field))
    return {"key_field": fields[0], "value_field": fields[1]}


def _compare(inputs, reduced=4, **fields):
    scale = inputs[0].shape[-1] ** -0.5
    got = paged_decode_attention(*inputs, **fields, scale=scale, backend=Backend.TRITON)
    wide = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs]
    wide_fields = {name: field.float() for name, field in fields.items()}
    assert_matches(got, paged_decode_attention_torch(*wide, **wide_fields, scale=scale), reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 0, 63, 64), (65, 200, 129)])
def test_matches_the_definition(dtype, lengths, device, rng):
    _compare(_inputs(lengths, 6, 2, 32, dtype, device, rng))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (2, 2), (20, 1)])
def test_matches_the_definition_for_every_head_size(head_dim, q_heads, kv_heads, device, rng):
    _compare(_inputs((100, 7), q_heads, kv_heads, head_dim, torch.float32, device, rng))


def test_a_request_that_sees_nothing_gives_zeros(device, rng):
    inputs = _inputs((0, 5), 4, 2, 32, torch.float32, device, rng)
    got = paged_decode_attention(*inputs, scale=1.0, backend=Backend.TRITON)
    assert torch.equal(got[0], torch.zeros_like(got[0]))


def test_no_requests_give_no_rows(device, rng):
    inputs = _inputs((5,), 4, 2, 32, torch.float32, device, rng)
    for index in (0, 3, 4, 5, 6):
        inputs[index] = inputs[index][:0]
    assert paged_decode_attention(*inputs, scale=1.0, backend=Backend.TRITON).shape == (0, 4, 32)


def test_rows_after_the_query_are_not_seen(device, rng):
    inputs = _inputs((130,), 4, 2, 32, torch.float32, device, rng)
    inputs[6] = torch.tensor([69], device=device)
    before = paged_decode_attention(*inputs, scale=1.0, backend=Backend.TRITON)
    blocks = inputs[3][0].long()
    inputs[1][blocks[1], 6:] = math.nan  # positions 70 to 127
    inputs[2][blocks[2]] = math.nan
    assert torch.equal(paged_decode_attention(*inputs, scale=1.0, backend=Backend.TRITON), before)


def test_a_hidden_row_is_replaced_by_the_row_that_stands_at_its_position(device, rng):
    inputs = _inputs((100,), 4, 2, 32, torch.float32, device, rng)
    keys, values, tables, positions, counts = inputs[1], inputs[2], inputs[3], inputs[4], inputs[5]
    own, spare = tables[0, 0].long(), tables[0, 2].long()
    plain = [tensor.clone() for tensor in inputs]
    fresh = torch.randn(2, 2, 32, device=device, generator=rng)
    plain[1][own, 10], plain[2][own, 10] = fresh  # overwritten in place
    keys[spare, 3], values[spare, 3] = fresh  # or put beside it, the old row hidden
    positions[0, 0, 10] = HIDDEN
    positions[0, 2, 3] = 10
    counts[0] = 3
    got = paged_decode_attention(*inputs, scale=0.2, backend=Backend.TRITON)
    assert_matches(got, paged_decode_attention_torch(*plain, scale=0.2), reduced=4)


def test_blocks_in_any_order_give_the_same_result(device, rng):
    inputs = _inputs((192,), 4, 2, 32, torch.float32, device, rng)
    straight = paged_decode_attention(*inputs, scale=0.2, backend=Backend.TRITON)
    order = torch.tensor([2, 0, 1, 3], device=device)
    inputs[3], inputs[4] = inputs[3][:, order].contiguous(), inputs[4][:, order].contiguous()
    assert_matches(paged_decode_attention(*inputs, scale=0.2, backend=Backend.TRITON), straight, reduced=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_matches_the_definition_with_a_field(head_dim, dtype, device, rng):
    inputs = _inputs((130, 0, 64), 6, 2, head_dim, dtype, device, rng)
    _compare(inputs, **_fields(inputs, rng))


@pytest.mark.parametrize("backend", list(Backend))
def test_a_field_is_as_if_its_vectors_were_added_to_the_rows(backend, device, rng):
    inputs = _inputs((130, 40), 4, 2, 32, torch.float32, device, rng)
    fields = _fields(inputs, rng)
    added = [tensor.clone() for tensor in inputs]
    for request, count in enumerate(inputs[5].tolist()):
        blocks = inputs[3][request, :count].long()
        for pool, field in zip(added[1:3], fields.values(), strict=True):
            pool[blocks] += field[request, :count].repeat_interleave(FIELD_ROWS, dim=1)
    got = paged_decode_attention(*inputs, **fields, scale=0.2, backend=backend)
    assert_matches(got, paged_decode_attention_torch(*added, scale=0.2), reduced=4)


def test_a_field_of_another_shape_is_refused(device, rng):
    inputs = _inputs((130,), 4, 2, 32, torch.float32, device, rng)
    fields = _fields(inputs, rng)
    with pytest.raises(KernelInputError, match="a field must be"):
        paged_decode_attention(
            *inputs, key_field=fields["key_field"][:, :1], value_field=fields["value_field"], scale=1.0
        )
    with pytest.raises(KernelInputError, match="given together"):
        paged_decode_attention(*inputs, key_field=fields["key_field"], scale=1.0)


def test_tables_of_another_shape_are_refused(device, rng):
    inputs = _inputs((5,), 4, 2, 32, torch.float32, device, rng)
    inputs[4] = inputs[4][..., :32]
    with pytest.raises(KernelInputError, match="tables must be of 1 requests"):
        paged_decode_attention(*inputs, scale=1.0)


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("head_dim", [32, 80])
def test_angles_that_are_added_are_those_of_the_table(head_dim, factor, device, rng):
    inputs = _inputs((250, 40, 200), 4, 2, head_dim, torch.float32, device, rng)
    positions = inputs[4]
    positions[0, 1] = positions[0, 1].flip(0)  # rows in another order
    positions[0, 2, 5:20] = HIDDEN
    positions[2, 0, 3] = HIDDEN
    angles = torch.outer(torch.arange(256, device=device), 100.0 ** -torch.linspace(0, 1, head_dim // 2, device=device))
    inputs[7:] = angles.cos() * factor, angles.sin() * factor
    bases = entry_bases(positions)
    assert bases[0].tolist() == [0, -1, 128, 192, -1]
    tile = DecodeTile(1, 32, 4, 2, adds_angles=True)
    got = launch_paged_decode_attention(*inputs, bases=bases, scale=0.2, tile=tile)
    assert_matches(got, paged_decode_attention_torch(*inputs, scale=0.2), reduced=4)


@pytest.mark.parametrize("merge", list(MergeLaunch))
def test_whenever_the_merge_is_launched_it_merges_all_parts(merge, device, rng):
    inputs = _inputs((129,), 4, 2, 32, torch.float32, device, rng)
    got = launch_paged_decode_attention(
        *inputs, scale=0.2, tile=DecodeTile(1, 32, 4, 2, merge=merge, merges_by_warp=True)
    )
    assert_matches(got, paged_decode_attention_torch(*inputs, scale=0.2), reduced=4)


@pytest.mark.parametrize("merge", list(MergeLaunch))
def test_a_merge_that_is_launched_early_waits(merge, device, rng, monkeypatch):
    launches = []
    monkeypatch.setattr("ragkit.kernels.merge_splits.can_launch_early", lambda device: True)
    monkeypatch.setattr(LaunchedKernel, "_launch", lambda self, grid, *given, **constants: launches.append(constants))
    inputs = _inputs((300, 129), 4, 2, 32, torch.float32, device, rng)
    launch_paged_decode_attention(*inputs, scale=0.2, tile=DecodeTile(1, 32, 4, 2, merge=merge))
    parts, merging = launches
    assert (parts["MERGE_AT_START"], parts["MERGE_AT_END"]) == (merge == "at start", merge == "at end")
    assert (merging["WAITS"], merging.get("launch_pdl", False)) == (merge != "after", merge != "after")


def test_bases_of_another_shape_are_refused(device, rng):
    inputs = _inputs((5,), 4, 2, 32, torch.float32, device, rng)
    with pytest.raises(KernelInputError, match="bases must be"):
        paged_decode_attention(*inputs, bases=entry_bases(inputs[4])[:, :1], scale=1.0)
