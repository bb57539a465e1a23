import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.rotate_heads import rotate_heads, rotate_heads_torch
from ragkit.kernels.testing import EDGE_TOKENS, assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(tokens, heads, head_dim, dtype, device, rng, rows=200):
    made = guarded(torch.randn(tokens, heads * head_dim, device=device, generator=rng).to(dtype))
    angles = torch.rand(rows, head_dim // 2, device=device, generator=rng) * 6
    where = torch.randint(0, max(rows, 1), (tokens,), device=device, generator=rng)
    return made.unflatten(1, (heads, head_dim)), angles.cos(), angles.sin(), guarded(where, 10**6)


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(tokens, dtype, device, rng):
    heads, cos, sin, where = inputs(tokens, 3, 24, dtype, device, rng)
    turned = rotate_heads(heads, cos, sin, where, backend=Backend.TRITON)
    assert turned.dtype is dtype
    assert_matches(turned, rotate_heads_torch(heads.float(), cos, sin, where))


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
def test_without_positions_every_token_has_its_own_row(tokens, device, rng):
    heads, cos, sin, _ = inputs(tokens, 2, 16, torch.float32, device, rng, rows=tokens)
    turned = rotate_heads(heads, cos, sin, backend=Backend.TRITON)
    assert_matches(turned, rotate_heads_torch(heads, cos, sin, torch.arange(tokens, device=device)))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 3, 8, 32])
def test_matches_the_definition_for_every_head_size(heads, head_dim, device, rng):
    given = inputs(3, heads, head_dim, torch.float32, device, rng)
    assert_matches(rotate_heads(*given, backend=Backend.TRITON), rotate_heads_torch(*given))


def test_heads_of_a_fused_projection_and_others_that_lie_apart_turn_alike(device, rng):
    heads, cos, sin, where = inputs(5, 6, 16, torch.float32, device, rng)
    expected = rotate_heads_torch(heads, cos, sin, where)
    middle = rotate_heads(heads[:, 2:4], cos, sin, where, backend=Backend.TRITON)
    apart = heads.transpose(0, 1).contiguous().transpose(0, 1)
    assert_matches(middle, expected[:, 2:4])
    assert_matches(rotate_heads(apart, cos, sin, where, backend=Backend.TRITON), expected)
    assert rotate_heads(apart, cos, sin, where).is_contiguous()


def test_the_heads_given_stay_as_they_are(device, rng):
    given = inputs(4, 2, 16, torch.float32, device, rng)
    before = given[0].clone()
    rotate_heads(*given, backend=Backend.TRITON)
    assert torch.equal(given[0], before)


def test_tables_and_positions_that_do_not_fit_are_refused(device, rng):
    heads, cos, sin, where = inputs(4, 2, 16, torch.float32, device, rng)
    with pytest.raises(KernelInputError, match="cos must be"):
        rotate_heads(heads, cos, sin)
    with pytest.raises(KernelInputError, match="positions must be"):
        rotate_heads(heads, cos, sin, where[:3])
    with pytest.raises(KernelInputError, match="even head_dim"):
        rotate_heads(heads[:, :, :15], cos, sin, where)
