import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.paged_decode_attention import paged_decode_attention_torch
from ragkit.kernels.paged_rows import FIELD_ROWS, HIDDEN, entry_bases
from ragkit.kernels.paged_verify_attention import (
    MOST_DRAFTED,
    VerifyTile,
    launch_paged_verify_attention,
    paged_verify_attention,
    paged_verify_attention_torch,
    verify_tile,
)
from ragkit.kernels.quantize_kv import quantize_kv_torch
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 64
SCALE = 0.2


def _chain(drafted):
    """Bit masks of a chain: token i sees the tokens 0 to i."""
    return [(1 << (index + 1)) - 1 for index in range(drafted)]


def _tree(drafted, generator):
    """Bit masks of a random tree in which every token comes behind its parent."""
    masks = [1]
    for index in range(1, drafted):
        parent = int(torch.randint(0, index, (), generator=generator))
        masks.append(masks[parent] | 1 << index)
    return masks


def _int32(masks, device):
    signed = [mask - (1 << 32) if mask >> 31 else mask for mask in masks]
    return torch.tensor(signed, dtype=torch.int32, device=device)


def _inputs(lengths, drafted, q_heads, kv_heads, head_dim, dtype, device, rng, masks=None):
    """Requests of `lengths` rows in scattered blocks; rows behind a request's end are NaN but reserved."""
    requests, entries = len(lengths), max(-(-length // BLOCK) for length in lengths) + 1
    blocks = requests * entries
    pools = [torch.full((blocks, BLOCK, kv_heads, head_dim), math.nan, device=device, dtype=dtype) for _ in range(2)]
    tables = torch.randperm(blocks, device=device, generator=rng).int().view(requests, entries)
    positions = torch.full((requests, entries * BLOCK), HIDDEN, dtype=torch.int32, device=device)
    for index, length in enumerate(lengths):
        reserved = min(length + drafted, entries * BLOCK)
        positions[index, :reserved] = torch.arange(reserved, device=device)
        rows = (tables[index].long().unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=device)).flatten()[:length]
        for pool in pools:
            pool.flatten(0, 1)[rows] = torch.randn(length, kv_heads, head_dim, device=device, generator=rng).to(dtype)
    counts = torch.tensor([-(-length // BLOCK) for length in lengths], dtype=torch.int32, device=device)
    tokens = requests * drafted
    heads = [
        guarded(torch.randn(tokens, count, head_dim, device=device, generator=rng).to(dtype))
        for count in (q_heads, kv_heads, kv_heads)
    ]
    angles = torch.rand(max(*lengths, 1), head_dim // 2, device=device, generator=rng) * 6
    return [
        *heads, guarded(pools[0]), guarded(pools[1]), tables, positions.view(requests, entries, BLOCK), counts,
        torch.tensor(lengths, device=device), _int32((masks or _chain(drafted)) * requests, device),
        guarded(angles.cos()), guarded(angles.sin()),
    ]  # fmt: skip


def _wide(inputs):
    return [part.float() if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in inputs]


def _compare(inputs, reduced=4, **fields):
    got = paged_verify_attention(*inputs, **fields, scale=SCALE, backend=Backend.TRITON)
    wide_fields = {name: field.float() for name, field in fields.items()}
    expected = paged_verify_attention_torch(*_wide(inputs), **wide_fields, scale=SCALE)
    assert_matches(got, expected, reduced=reduced)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 0, 63, 64), (65, 200, 129)])
def test_matches_the_definition(dtype, lengths, device, rng):
    _compare(_inputs(lengths, 5, 6, 2, 32, dtype, device, rng))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (2, 2), (20, 1)])
def test_matches_the_definition_for_every_head_size(head_dim, q_heads, kv_heads, device, rng):
    _compare(_inputs((100, 7), 3, q_heads, kv_heads, head_dim, torch.float32, device, rng))


@pytest.mark.parametrize("drafted", [1, 2, 4, 8, 16, 32])
def test_matches_the_definition_for_every_number_of_tokens_of_a_tree(drafted, device, rng):
    masks = _tree(drafted, torch.Generator().manual_seed(drafted))
    _compare(_inputs((130, 40), drafted, 8, 2, 32, torch.float32, device, rng, masks))


def test_one_token_attends_as_a_decoding_step_does(device, rng):
    inputs = _inputs((130, 40), 1, 4, 2, 32, torch.float32, device, rng)
    queries, keys, values, key_pool, value_pool, tables, positions, counts, lengths, _, _, _ = inputs
    angles = torch.rand(200, 16, device=device, generator=rng) * 6
    inputs[10:] = angles.cos(), angles.sin()
    got = paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON)
    slots = [tables[i, length // BLOCK].long() * BLOCK + length % BLOCK for i, length in enumerate(lengths.tolist())]
    turned = keys.clone()  # as the pool has them: what rotates to `keys` at their positions
    cos, sin = inputs[10][lengths].unsqueeze(1), inputs[11][lengths].unsqueeze(1)
    first, second = keys.chunk(2, dim=-1)
    turned[..., :16], turned[..., 16:] = first * cos + second * sin, second * cos - first * sin
    key_pool.flatten(0, 1)[torch.stack(slots)] = turned
    value_pool.flatten(0, 1)[torch.stack(slots)] = values
    counts = (lengths // BLOCK + 1).int()
    expected = paged_decode_attention_torch(
        queries, key_pool, value_pool, tables, positions, counts, lengths, *inputs[10:], scale=SCALE
    )
    assert_matches(got, expected, reduced=4)


def test_a_token_sees_nothing_of_another_branch(device, rng):
    masks = [0b1, 0b11, 0b101, 0b1101]  # 1 and 2 are children of 0, 3 is one of 2
    inputs = _inputs((70,), 4, 4, 2, 32, torch.float32, device, rng, masks)
    before = paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON)
    inputs[1][1] = inputs[2][1] = 9.0
    after = paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON)
    same = [index for index in range(4) if torch.equal(before[index], after[index])]
    assert same == [0, 2, 3]


def test_rows_reserved_for_drafted_tokens_are_not_read(device, rng):
    inputs = _inputs((130,), 4, 4, 2, 32, torch.float32, device, rng)
    before = paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON)
    assert bool(torch.isfinite(before).all())
    inputs[8] = torch.tensor([69], device=device)
    shorter = paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON)
    blocks = inputs[5][0].long()
    inputs[3][blocks[1], 5:] = math.nan  # positions 69 to 127
    inputs[4][blocks[2]] = math.nan
    assert torch.equal(paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON), shorter)


def test_places_that_no_token_fills_give_finite_rows_and_change_no_other(device, rng):
    inputs = _inputs((70, 30), 4, 4, 2, 32, torch.float32, device, rng)
    whole = paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON)
    inputs[9] = inputs[9].clone()
    inputs[9][2:4] = 0
    got = paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON)
    assert bool(torch.isfinite(got).all())
    kept = [0, 1, 4, 5, 6, 7]
    assert torch.equal(got[kept], whole[kept])


def test_a_request_that_sees_nothing_gives_zeros(device, rng):
    inputs = _inputs((0, 5), 2, 4, 2, 32, torch.float32, device, rng)
    inputs[9] = torch.zeros_like(inputs[9])
    got = paged_verify_attention(*inputs, scale=1.0, backend=Backend.TRITON)
    assert torch.equal(got[:2], torch.zeros_like(got[:2]))


def test_no_requests_give_no_rows(device, rng):
    inputs = _inputs((5,), 2, 4, 2, 32, torch.float32, device, rng)
    for index in (0, 1, 2, 5, 6, 7, 8, 9):
        inputs[index] = inputs[index][:0]
    assert paged_verify_attention(*inputs, scale=1.0, backend=Backend.TRITON).shape == (0, 4, 32)


def test_heads_of_a_fused_projection_are_read_where_they_lie(device, rng):
    inputs = _inputs((130, 40), 3, 4, 2, 32, torch.float32, device, rng)
    straight = paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON)
    inputs[:3] = torch.cat(inputs[:3], dim=1).split([4, 2, 2], dim=1)
    assert torch.equal(paged_verify_attention(*inputs, scale=SCALE, backend=Backend.TRITON), straight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_matches_the_definition_with_a_field(head_dim, dtype, device, rng):
    inputs = _inputs((130, 0, 64), 4, 6, 2, head_dim, dtype, device, rng)
    fields = {}
    for name in ("key_field", "value_field"):
        shape = (*inputs[5].shape, BLOCK // FIELD_ROWS, 2, head_dim)
        field = torch.randn(shape, device=device, generator=rng).to(dtype)
        field[torch.arange(shape[1], device=device) >= inputs[7].unsqueeze(1)] = math.nan
        fields[name] = guarded(field)
    _compare(inputs, **fields)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
def test_matches_the_definition_over_codes(bits, group, dtype, device, rng):
    inputs = _inputs((130, 40), 4, 6, 2, 64, torch.float32, device, rng)
    for place, groups in ((3, (group, 1)), (4, (1, 32))):
        numbers = torch.nan_to_num(inputs[place], nan=0.0)
        codes = QuantizedBlocks.empty(tuple(numbers.shape), bits, *groups, device)
        slots = torch.arange(codes.scales.shape[0] * codes.scales.shape[1], device=device)
        quantize_kv_torch(
            numbers.flatten(0, 1), bits=bits, token_group=groups[0], channel_group=groups[1], out=codes.heads(),
            slots=slots,
        )  # fmt: skip
        inputs[place] = codes
    inputs[:3] = [part.to(dtype) for part in inputs[:3]]
    _compare(inputs)


@pytest.mark.parametrize("tile", [VerifyTile(16, 16, 4, 2), VerifyTile(64, 64, 4, 2), VerifyTile(128, 32, 8, 3)])
def test_every_way_to_cut_the_work_gives_the_same(tile, device, rng):
    inputs = _inputs((130, 40), 9, 8, 2, 32, torch.float32, device, rng)
    expected = paged_verify_attention_torch(*inputs, scale=SCALE)
    assert_matches(launch_paged_verify_attention(*inputs, scale=SCALE, tile=tile), expected, reduced=4)


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("head_dim", [32, 80])
def test_angles_that_are_added_are_those_of_the_table(head_dim, factor, device, rng):
    inputs = _inputs((250, 40, 200), 3, 4, 2, head_dim, torch.float32, device, rng)
    positions = inputs[6]
    positions[0, 1] = positions[0, 1].flip(0)  # rows in another order
    positions[0, 2, 5:20] = HIDDEN
    positions[2, 0, 3] = HIDDEN
    inputs[3], inputs[4] = (torch.nan_to_num(pool, nan=0.0) for pool in inputs[3:5])
    angles = torch.outer(torch.arange(400, device=device), 100.0 ** -torch.linspace(0, 1, head_dim // 2, device=device))
    inputs[10:] = angles.cos() * factor, angles.sin() * factor
    bases = entry_bases(positions)
    assert bases[0].tolist() == [0, -1, 128, 192, -1]
    tile = VerifyTile(16, 32, 4, 2, adds_angles=True)
    got = launch_paged_verify_attention(*inputs, bases=bases, scale=SCALE, tile=tile)
    assert_matches(got, paged_verify_attention_torch(*inputs, scale=SCALE), reduced=4)


def test_bases_of_another_shape_are_refused(device, rng):
    inputs = _inputs((5,), 2, 4, 2, 32, torch.float32, device, rng)
    with pytest.raises(KernelInputError, match="bases must be"):
        paged_verify_attention(*inputs, bases=entry_bases(inputs[6])[:, :1], scale=1.0)


def test_eight_tokens_of_a_large_model_stand_in_one_tile_of_a_gpu():
    pool = torch.empty(2, 64, 8, 128, dtype=torch.bfloat16)
    queries = torch.empty(8, 32, 128, dtype=torch.bfloat16, device="meta")
    assert verify_tile(queries, 1, pool, pool).pairs == 16  # the interpreter's
    if torch.cuda.is_available():
        assert verify_tile(torch.empty_like(queries, device="cuda"), 1, pool, pool).pairs == 32


def test_more_tokens_than_a_mask_has_bits_are_refused(device, rng):
    inputs = _inputs((5,), 2, 4, 2, 32, torch.float32, device, rng)
    many = MOST_DRAFTED + 1
    inputs[:3] = [part[:1].expand(many, -1, -1).contiguous() for part in inputs[:3]]
    inputs[9] = torch.zeros(many, dtype=torch.int32, device=device)
    with pytest.raises(KernelInputError, match="at most 32, got 33"):
        paged_verify_attention(*inputs, scale=1.0)


def test_masks_of_another_type_are_refused(device, rng):
    inputs = _inputs((5,), 2, 4, 2, 32, torch.float32, device, rng)
    inputs[9] = inputs[9].long()
    with pytest.raises(KernelInputError, match="ancestors must be"):
        paged_verify_attention(*inputs, scale=1.0)


def test_own_keys_of_other_heads_are_refused(device, rng):
    inputs = _inputs((5,), 2, 4, 2, 32, torch.float32, device, rng)
    inputs[1] = inputs[1][:, :1]
    with pytest.raises(KernelInputError, match="own keys have 1 heads"):
        paged_verify_attention(*inputs, scale=1.0)
