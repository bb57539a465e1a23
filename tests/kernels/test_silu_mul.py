import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.silu_mul import silu_mul, silu_mul_torch
from ragkit.kernels.testing import EDGE_TOKENS, assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(tokens, dtype, device, rng):
    gate_up = guarded(torch.randn(tokens, 2 * 129, device=device, generator=rng).to(dtype) * 4)
    assert_matches(silu_mul(gate_up, backend=Backend.TRITON), silu_mul_torch(gate_up.float()))


def test_a_row_longer_than_one_program_is_complete(device, rng):
    gate_up = torch.randn(2, 2 * 1500, device=device, generator=rng)
    assert_matches(silu_mul(gate_up, backend=Backend.TRITON), silu_mul_torch(gate_up))


def test_very_negative_gates_give_zero_and_not_nan(device):
    gate_up = torch.tensor([[-1e4, -90.0, 3.0, 3.0]], device=device)
    assert torch.equal(silu_mul(gate_up, backend=Backend.TRITON).abs() < 1e-30, torch.ones(1, 2, device=device).bool())


def test_an_odd_number_of_columns_is_refused(device):
    with pytest.raises(KernelInputError, match=r"2 \* size"):
        silu_mul(torch.ones(2, 7, device=device))
