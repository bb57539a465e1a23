import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.int4_linear import GROUPS, Int4Weight, int4_linear, int4_linear_torch, quantize_int4
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _case(tokens, features, columns, dtype, device, rng, group=0):
    weight = quantize_int4(torch.randn(features, columns, device=device, generator=rng), group)
    codes = torch.randint(-(2**31), 2**31, weight.codes.shape, device=device, generator=rng, dtype=torch.int64).int()
    weight = Int4Weight(codes, guarded(weight.scales), guarded(weight.zeros))
    rows = torch.randn(tokens, columns, device=device, generator=rng).to(dtype)
    return guarded(rows), weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 16, 17])
def test_matches_the_definition(tokens, dtype, device, rng):
    rows, weight = _case(tokens, 70, 256, dtype, device, rng)
    got = int4_linear(rows, weight, backend=Backend.TRITON)
    assert got.dtype == dtype
    assert_matches(got, int4_linear_torch(rows.float(), weight), reduced=256)


@pytest.mark.parametrize(("columns", "group"), [(384, 128), (384, 64), (384, 32), (320, 64), (320, 32), (96, 32)])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_matches_the_definition_for_every_group(tokens, columns, group, device, rng):
    rows, weight = _case(tokens, 33, columns, torch.float32, device, rng, group)
    assert weight.group == group
    assert_matches(int4_linear(rows, weight, backend=Backend.TRITON), int4_linear_torch(rows, weight), reduced=columns)


@pytest.mark.parametrize("tokens", [2, 7])
def test_rows_of_a_wider_tensor_are_read_where_they_lie(tokens, device, rng):
    rows, weight = _case(tokens, 20, 128, torch.float32, device, rng)
    wide = torch.full((tokens, 200), torch.nan, device=device)
    wide[:, :128] = rows
    got = int4_linear(wide[:, :128], weight, backend=Backend.TRITON)
    assert torch.equal(got, int4_linear(rows.clone(), weight, backend=Backend.TRITON))


def test_every_code_comes_back(device):
    codes = torch.arange(16, device=device).repeat(3, 16)
    codes[1], codes[2] = codes[1].flip(0), codes[2].roll(5)
    weight = quantize_int4(codes.float() * 0.5 - 3, 128)
    assert torch.equal(weight.unpacked(), codes)
    torch.testing.assert_close(weight.numbers(), codes.float() * 0.5 - 3)


@pytest.mark.parametrize("group", GROUPS)
def test_rounding_is_within_half_a_step(group, device, rng):
    numbers = torch.randn(9, 256, device=device, generator=rng)
    weight = quantize_int4(numbers, group)
    step = weight.scales.t().repeat_interleave(group, dim=1).float()
    # A little more: scales and zeros are rounded themselves.
    assert bool(((weight.numbers() - numbers).abs() <= step * 0.52).all())


def test_a_group_of_equal_numbers_is_kept(device):
    weight = quantize_int4(torch.full((2, 64), 0.25, device=device))
    assert torch.equal(weight.numbers(), torch.full((2, 64), 0.25, device=device))


def test_weights_take_little_more_than_half_a_byte():
    weight = quantize_int4(torch.randn(64, 1024))
    assert weight.nbytes / (64 * 1024) == 0.5 + 4 / 128


def test_the_widest_group_that_divides_the_columns_is_taken():
    assert [quantize_int4(torch.ones(2, columns)).group for columns in (4096, 576, 96)] == [128, 64, 32]
    with pytest.raises(KernelInputError, match="rows of 100 weights"):
        quantize_int4(torch.ones(2, 100))
    with pytest.raises(KernelInputError, match="divide 576 columns, got 128"):
        quantize_int4(torch.ones(2, 576), 128)


def test_rows_of_another_length_are_refused(device, rng):
    rows, weight = _case(2, 20, 128, torch.float32, device, rng)
    with pytest.raises(KernelInputError, match=r"rows must be \(tokens, 128\)"):
        int4_linear(rows[:, :64], weight)


def test_scales_that_do_not_fit_are_refused(device, rng):
    _, weight = _case(2, 20, 128, torch.float32, device, rng)
    with pytest.raises(KernelInputError, match="do not fit codes"):
        Int4Weight(weight.codes, weight.scales[:, :5].contiguous(), weight.zeros)
