import pytest
import torch

from ragkit.kernels.rotation import rotate_into
from ragkit.kernels.testing import assert_matches, canaried


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_each_pair_of_channels_turns_by_the_angle_of_its_token(tokens, head_dim, dtype, device, rng):
    heads = torch.randn(tokens, 3, head_dim, device=device, generator=rng).to(dtype)
    angles = torch.rand(tokens, head_dim // 2, device=device, generator=rng) * 6
    out, check = canaried((tokens, 3, head_dim), dtype, device)
    rotate_into(out, heads, angles.cos(), angles.sin())
    check()
    first, second = heads.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    assert_matches(out, torch.cat((turned.real, turned.imag), dim=-1))


def test_heads_may_be_a_view_over_a_fused_projection(device, rng):
    fused = torch.randn(5, 4, 16, device=device, generator=rng)
    angles = torch.rand(5, 8, device=device, generator=rng)
    out, expected = torch.empty(5, 2, 16, device=device), torch.empty(5, 2, 16, device=device)
    rotate_into(out, fused[:, 1:3], angles.cos(), angles.sin())
    rotate_into(expected, fused[:, 1:3].contiguous(), angles.cos(), angles.sin())
    assert torch.equal(out, expected)
