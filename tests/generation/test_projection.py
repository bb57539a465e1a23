import pytest
import torch
from torch.nn import functional

from ragkit.generation.projection import Projection


@pytest.mark.parametrize("rows", [0, 1, 3, 300])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_plain_product(rows, dtype, limit, with_bias):
    weight = torch.randn(37, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.linspace(-1, 1, 37).to(dtype) if with_bias else None
    inputs = torch.randn(rows, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = Projection(weight, bias)(inputs)
    expected = functional.linear(inputs.float(), weight.float(), None if bias is None else bias.float())
    assert got.shape == (rows, 37)
    assert got.dtype is dtype
    if rows:
        assert float((got.float() - expected).abs().max() / expected.abs().max()) < limit
