import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.gather_pages import PageLists, gather_pages, gather_pages_torch
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _int32(numbers, device):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _inputs(block_size, kv_heads, head_dim, dtype, device, rng, *, per_head=False):
    """Pools of nine blocks of which two are listed by no one and hold NaN, and lists of four pages."""
    pools = [torch.randn(9, block_size, kv_heads, head_dim, device=device, generator=rng).to(dtype) for _ in range(2)]
    for pool in pools:
        pool[[0, 5]] = math.nan
    pages = [[2, 1, 3, 2], [6, 4, 0, 1], [5, 2, 2, 6]]  # pages 0 to 6 lie in blocks 1 to 4 and 6 to 8
    pages = _int32([pages[head % 3] for head in range(kv_heads)] if per_head else pages[:1], device)
    positions = _int32([[-1, 0, 17, 40]], device)
    if per_head:
        positions = positions.repeat(kv_heads, 1) + torch.arange(kv_heads, device=device, dtype=torch.int32)[:, None]
    angles = torch.rand(50 + kv_heads + block_size, head_dim // 2, device=device, generator=rng) * 6
    tables = guarded(angles.cos()), guarded(angles.sin())
    blocks = _int32([1, 2, 3, 4, 6, 7, 8], device)
    return [*(guarded(pool) for pool in pools), PageLists(pages, positions, blocks), *tables]


def _quantised(pool, bits, row_group, channel_group):
    """The rows of a pool as codes, those of every block by themselves."""
    whole = quantize_kv(
        torch.nan_to_num(pool).flatten(0, 1), bits=bits, token_group=row_group, channel_group=channel_group
    )
    return QuantizedBlocks(*(part.unflatten(0, (len(pool), -1)).contiguous() for part in whole), bits)


def _compare(inputs, dtype):
    got = gather_pages(*inputs, dtype=dtype, backend=Backend.TRITON)
    pools = [pool.float() if isinstance(pool, torch.Tensor) else pool for pool in inputs[:2]]
    expected = gather_pages_torch(*pools, *inputs[2:], dtype=torch.float32)
    for mine, reference in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert bool(reference.isfinite().all())
        assert_matches(mine, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("block_size", [16, 64])
def test_matches_the_definition(block_size, per_head, dtype, device, rng):
    _compare(_inputs(block_size, 3, 32, dtype, device, rng, per_head=per_head), dtype)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("rows", [64, 51])
def test_rows_are_written_where_asked_and_none_behind_the_room_that_there_is(rows, backend, device, rng):
    inputs = _inputs(16, 3, 32, torch.float32, device, rng)
    room = [torch.full((64, 3, 32), 7.0, device=device) for _ in range(2)]
    gather_pages(*inputs, dtype=torch.float32, out=(room[0][:rows], room[1][:rows]), backend=backend)
    for mine, reference in zip(room, gather_pages_torch(*inputs, dtype=torch.float32), strict=True):
        assert_matches(mine[:rows], reference[:rows])
        assert bool((mine[rows:] == 7).all())


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_matches_the_definition_for_every_head_size(head_dim, device, rng):
    _compare(_inputs(32, 2, head_dim, torch.bfloat16, device, rng, per_head=True), torch.bfloat16)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("head_dim", "row_group"), [(32, 32), (80, 16)])
def test_codes_become_numbers(head_dim, row_group, per_head, bits, device, rng):
    inputs = _inputs(32, 2, head_dim, torch.float32, device, rng, per_head=per_head)
    inputs[0], inputs[1] = _quantised(inputs[0], bits, row_group, 1), _quantised(inputs[1], bits, 1, 8)
    _compare(inputs, torch.float32)
    _compare(inputs, torch.bfloat16)


@pytest.mark.parametrize("backend", list(Backend))
def test_rows_stand_behind_their_page_and_those_of_a_negative_page_at_zero(backend, device, rng):
    keys, values, lists, cos, sin = _inputs(16, 1, 32, torch.float32, device, rng)
    keys.fill_(1.0)
    out, _ = gather_pages(keys, values, lists, cos, sin, dtype=torch.float32, backend=backend)
    turned = torch.cat((cos - sin, cos + sin), dim=1)
    expected = torch.cat((turned[:1].expand(16, 32), turned[0:16], turned[17:33], turned[40:56]))
    assert_matches(out[:, 0], expected)


@pytest.mark.parametrize("backend", list(Backend))
def test_values_are_those_of_the_listed_pages_in_the_order_of_the_list(backend, device, rng):
    keys, values, lists, cos, sin = _inputs(16, 2, 32, torch.float32, device, rng, per_head=True)
    _, out = gather_pages(keys, values, lists, cos, sin, dtype=torch.float32, backend=backend)
    assert torch.equal(out[:, 0], values[[3, 2, 4, 3], :, 0].flatten(0, 1))
    assert torch.equal(out[:, 1], values[[8, 6, 1, 2], :, 1].flatten(0, 1))
    plain = PageLists(_int32([[7, 3]], device), _int32([[0, 16]], device))
    _, out = gather_pages(keys, values, plain, cos, sin, dtype=torch.float32, backend=backend)
    assert torch.equal(out, values[[7, 3]].flatten(0, 1))


@pytest.mark.parametrize("backend", list(Backend))
def test_an_empty_list_gives_no_rows(backend, device, rng):
    inputs = _inputs(16, 2, 32, torch.float32, device, rng)
    inputs[2] = PageLists(inputs[2].pages[:, :0], inputs[2].positions[:, :0])
    keys, values = gather_pages(*inputs, dtype=torch.bfloat16, backend=backend)
    assert (keys.shape, values.shape, keys.dtype) == ((0, 2, 32), (0, 2, 32), torch.bfloat16)


def test_inputs_that_do_not_fit_are_refused(device, rng):
    inputs = _inputs(32, 2, 32, torch.float32, device, rng)
    pages, positions, blocks = inputs[2]
    codes = _quantised(inputs[1], 8, 1, 8)
    for index, wrong, message in (
        (0, inputs[0][:, :24].contiguous(), "alike"),
        (0, inputs[0].transpose(0, 1).contiguous().transpose(0, 1), "contiguous and of one type"),
        (0, codes, "both be numbers or both be codes"),
        (2, PageLists(pages[0], positions, blocks), r"pages must be \(1 or 2, listed\)"),
        (2, PageLists(pages.repeat(3, 1), positions, blocks), r"pages must be \(1 or 2, listed\), got \(3, 4\)"),
        (2, PageLists(pages, positions[:, :3], blocks), r"positions must be \(1, 4\) or one row"),
        (2, PageLists(pages.long(), positions, blocks), "pages must be int32"),
        (2, PageLists(pages, positions, blocks[None]), r"blocks must be \(pages,\)"),
        (3, inputs[3][:, :8], r"cos and sin must be \(positions, 16\)"),
    ):
        with pytest.raises(KernelInputError, match=message):
            gather_pages(*inputs[:index], wrong, *inputs[index + 1 :], dtype=torch.float32)
    for pool in (inputs[0][:, :24].contiguous(), inputs[0][:, :8].contiguous()):
        with pytest.raises(KernelInputError, match="powers of two from 16 rows on"):
            gather_pages(pool, pool, *inputs[2:], dtype=torch.float32)
    with pytest.raises(KernelInputError, match="channel by channel"):
        gather_pages(codes, codes, *inputs[2:], dtype=torch.float32)
