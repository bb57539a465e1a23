import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.add_rms_norm import add_rms_norm, add_rms_norm_torch
from ragkit.kernels.backend import Backend
from ragkit.kernels.testing import EDGE_TOKENS, assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_matches_the_definition(tokens, dtype, with_residual, device, rng):
    size = 96 + tokens % 2 * 7  # also a size that is no power of two
    hidden = guarded(torch.randn(tokens, size, device=device, generator=rng).to(dtype))
    residual = guarded(torch.randn(tokens, size, device=device, generator=rng).to(dtype)) if with_residual else None
    weight = guarded(torch.randn(size, device=device, generator=rng).to(dtype))
    normed, summed = add_rms_norm(hidden, residual, weight, 1e-5, backend=Backend.TRITON)
    expected_normed, expected_summed = add_rms_norm_torch(hidden, residual, weight, 1e-5)
    assert_matches(normed, expected_normed.float())
    assert_matches(summed, expected_summed.float())


def test_reads_rows_that_lie_apart(device, rng):
    wide = torch.randn(5, 300, device=device, generator=rng)
    wide[:, 100:] = torch.nan
    weight = torch.ones(100, device=device)
    normed, _ = add_rms_norm(wide[:, :100], wide[:, :100], weight, 1e-6, backend=Backend.TRITON)
    assert_matches(normed, add_rms_norm_torch(wide[:, :100], wide[:, :100], weight, 1e-6)[0])


def test_without_residual_the_sum_is_the_input_itself(device):
    hidden = torch.ones(2, 8, device=device)
    assert add_rms_norm(hidden, None, torch.ones(8, device=device), 1e-6)[1] is hidden


def test_eps_keeps_a_row_of_zeros_finite(device):
    normed, _ = add_rms_norm(torch.zeros(1, 8, device=device), None, torch.ones(8, device=device), 1e-6)
    assert torch.equal(normed, torch.zeros(1, 8, device=device))


@pytest.mark.parametrize("shape", [(3, 9), (4, 8)])
def test_a_residual_of_another_shape_is_refused(shape, device):
    with pytest.raises(KernelInputError, match="residual must be like hidden"):
        add_rms_norm(torch.ones(3, 8, device=device), torch.ones(shape, device=device), torch.ones(8, device=device), 0)
