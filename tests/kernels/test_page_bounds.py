import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.page_bounds import page_bounds, page_bounds_torch
from ragkit.kernels.page_scores import KeyBounds
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kernels.testing import CANARY, canaried, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POOL, ALL = 9, 11  # pages of the pool, and pages that there is room for
LISTED = (7, 0, 4)


def _codes(page_size, kv_heads, head_dim, bits, group, device, rng):
    """Keys as codes; pages that are not listed, and what lies around the pool, are no numbers."""
    rows = torch.randn(POOL * page_size, kv_heads, head_dim, device=device, generator=rng)
    rows[..., 1] = rows[..., 1] * 9 + 60  # keys before RoPE have such channels
    parts = quantize_kv(rows, bits=bits, token_group=group, channel_group=1)
    codes, scales, zeros = (part.unflatten(0, (POOL, -1)).contiguous() for part in parts)
    others = [page for page in range(POOL) if page not in LISTED]
    scales[others], zeros[others] = math.nan, math.nan
    return QuantizedBlocks(guarded(codes, 255), guarded(scales), guarded(zeros), bits)


def _room(keys, parts, dtype):
    """Bounds of all pages, canaries everywhere, and checks that nothing around them is written."""
    room = [canaried((ALL, parts, *keys.shape[2:]), dtype, keys.codes.device) for _ in range(2)]
    return KeyBounds(*(side for side, _ in room)), [check for _, check in room]


def _listed(device):
    return torch.tensor(LISTED, device=device)


def _stored(numbers, dtype):
    """Numbers fp32 as a kernel stores them: the interpreter cuts bf16 off where a GPU rounds."""
    if dtype != torch.bfloat16 or numbers.is_cuda:
        return numbers.to(dtype)
    return (numbers.view(torch.int32) & -65536).view(torch.float32).to(dtype)


def _compare(keys, parts, dtype, margin=0.0):
    """The kernel writes what the definition writes, bit for bit, and nothing else."""
    (mine, checks), (expected, _) = _room(keys, parts, dtype), _room(keys, parts, torch.float32)
    pages = _listed(keys.codes.device)
    page_bounds(keys, pages, mine, margin=margin, backend=Backend.TRITON)
    page_bounds_torch(keys, pages, expected, margin=margin)
    for side, reference in zip(mine, expected, strict=True):
        assert bool(reference[pages].isfinite().all())
        assert torch.equal(side, _stored(reference, dtype))
        assert int((side == CANARY).all(dim=(1, 2, 3)).sum()) == ALL - len(LISTED)
    for check in checks:
        check()
    assert bool((mine.lower <= mine.upper).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("page_size", "group", "parts"), [(64, 64, 4), (64, 32, 4), (16, 16, 1), (8, 8, 1), (64, 16, 1), (64, 64, 1)]
)
def test_matches_the_definition_bit_for_bit(page_size, group, parts, bits, dtype, device, rng):
    _compare(_codes(page_size, 2, 32, bits, group, device, rng), parts, dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [6, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_matches_the_definition_for_every_head_size(kv_heads, head_dim, bits, device, rng):
    _compare(_codes(32, kv_heads, head_dim, bits, 32, device, rng), 2, torch.bfloat16)


@pytest.mark.parametrize("parts", [2, 8, 16, 32])
def test_parts_of_few_rows_and_parts_of_many_groups_have_their_own_bounds(parts, device, rng):
    _compare(_codes(32, 2, 32, 4, 4, device, rng), parts, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", list(Backend))
def test_bounds_are_those_of_the_decoded_keys_of_their_type(backend, bits, dtype, device, rng):
    if (backend, dtype, device.type) == (Backend.TRITON, torch.bfloat16, "cpu"):
        pytest.skip("the interpreter does not round to bf16")
    keys, pages = _codes(64, 2, 32, bits, 32, device, rng), _listed(device)
    bounds, _ = _room(keys, 4, dtype)
    page_bounds(keys, pages, bounds, backend=backend)
    slots = (pages.unsqueeze(1) * 64 + torch.arange(64, device=device)).flatten()
    decoded = keys.rows(slots).to(dtype).view(len(LISTED), 4, 16, 2, 32)
    assert torch.equal(bounds.lower[pages], decoded.amin(dim=2))
    assert torch.equal(bounds.upper[pages], decoded.amax(dim=2))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_margin_moves_bounds_outward_so_that_rounding_leaves_them_bounds(bits, device, rng):
    keys, pages = _codes(64, 2, 32, bits, 32, device, rng), _listed(device)
    _compare(keys, 4, torch.bfloat16, margin=2.0**-8)
    bounds, _ = _room(keys, 4, torch.bfloat16)
    page_bounds(keys, pages, bounds, margin=2.0**-8)
    slots = (pages.unsqueeze(1) * 64 + torch.arange(64, device=device)).flatten()
    decoded = keys.rows(slots).view(len(LISTED), 4, 16, 2, 32)
    lower, upper = (side[pages].float().unsqueeze(2) for side in bounds)
    assert bool(((lower <= decoded) & (decoded <= upper)).all())
    assert bool((lower < decoded.amin(dim=2, keepdim=True)).any())


@pytest.mark.parametrize("backend", list(Backend))
def test_an_empty_list_writes_nothing(backend, device, rng):
    keys = _codes(16, 2, 32, 8, 16, device, rng)
    bounds, _ = _room(keys, 1, torch.bfloat16)
    page_bounds(keys, _listed(device)[:0], bounds, backend=backend)
    assert all(bool((side == CANARY).all()) for side in bounds)


def test_inputs_that_do_not_fit_are_refused(device, rng):
    keys, pages = _codes(32, 2, 32, 8, 32, device, rng), _listed(device)
    (lower, upper), _ = _room(keys, 2, torch.bfloat16)
    rows = quantize_kv(torch.zeros(64, 2, 32, device=device), bits=8, token_group=1, channel_group=8)
    values = QuantizedBlocks(*(part.unflatten(0, (2, -1)).contiguous() for part in rows), 8)
    odd = QuantizedBlocks(*(part[:, : part.shape[1] * 3 // 4].contiguous() for part in _parts_of_quarters(keys)), 8)
    for blocks, at, sides, message in (
        (values, pages, (lower, upper), "channel by channel, got groups of 8"),
        (odd, pages, (lower, upper), "powers of two, got 24 and 8 rows"),
        (keys, pages.int(), (lower, upper), r"pages must be \(pages,\) int64"),
        (keys, pages[None], (lower, upper), r"got \(1, 3\)"),
        (keys, pages, (lower, upper.float()), "both bounds must be alike"),
        (keys, pages, (lower, upper[1:]), "both bounds must be alike"),
        (keys, pages, (lower.int(), upper.int()), "of a float type"),
        (keys, pages, (lower[..., :16], upper[..., :16]), r"bounds must be \(pages, parts of 32 rows, 2, 32\)"),
        (keys, pages, (lower.repeat(1, 3, 1, 1), upper.repeat(1, 3, 1, 1)), r"got \(11, 6, 2, 32\)"),
        (keys, pages, (lower[:, :1], upper[:, :1]), "bounds must be contiguous"),
    ):
        with pytest.raises(KernelInputError, match=message):
            page_bounds(blocks, at, KeyBounds(*sides))
    with pytest.raises(KernelInputError, match="margin must be at least zero"):
        page_bounds(keys, pages, KeyBounds(lower, upper), margin=-0.1)


def _parts_of_quarters(keys):
    """Codes, scales and zeros of pages of which four groups of rows share scales each."""
    rows = torch.zeros(POOL * keys.shape[1], *keys.shape[2:], device=keys.codes.device)
    parts = quantize_kv(rows, bits=8, token_group=keys.shape[1] // 4, channel_group=1)
    return [part.unflatten(0, (POOL, -1)) for part in parts]
