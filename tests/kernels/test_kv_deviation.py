import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.kv_deviation import kv_deviation, kv_deviation_torch
from ragkit.kernels.testing import EDGE_TOKENS, assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _inputs(tokens, heads, head_dim, dtype, device, rng):
    """Fresh keys and values as views over one fused projection, cached ones apart."""
    fused = guarded(torch.randn(tokens, 3 * heads, head_dim, device=device, generator=rng).to(dtype))
    fused[:, :heads] = math.nan
    cached = [guarded(torch.randn(tokens, heads, head_dim, device=device, generator=rng).to(dtype)) for _ in range(2)]
    return [fused[:, heads : 2 * heads], fused[:, 2 * heads :], *cached]


def _compare(inputs):
    got = kv_deviation(*inputs, backend=Backend.TRITON)
    expected = kv_deviation_torch(*(tensor.float() for tensor in inputs))
    for mine, reference in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert_matches(mine, reference)


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(tokens, dtype, device, rng):
    _compare(_inputs(tokens, 3, 32, dtype, device, rng))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_matches_the_definition_for_every_head_size(head_dim, heads, device, rng):
    _compare(_inputs(6, heads, head_dim, torch.bfloat16, device, rng))


@pytest.mark.parametrize("backend", list(Backend))
def test_keys_and_values_are_compared_apart_and_over_all_heads(backend, device, rng):
    inputs = _inputs(4, 2, 16, torch.float32, device, rng)
    inputs[2:] = [tensor.clone() for tensor in inputs[:2]]
    inputs[2][1, 1, 15] += 3.0
    inputs[3][2, 0, 0] -= 2.0
    inputs[3][2, 1, 3] += 1.0
    of_keys, of_values = kv_deviation(*inputs, backend=backend)
    assert of_keys.tolist() == pytest.approx([0.0, 9.0, 0.0, 0.0], rel=1e-5)
    assert of_values.tolist() == pytest.approx([0.0, 0.0, 5.0, 0.0], rel=1e-5)


@pytest.mark.parametrize("backend", list(Backend))
def test_inputs_are_left_as_they_are(backend, device, rng):
    inputs = _inputs(4, 2, 16, torch.float32, device, rng)
    before = [tensor.clone() for tensor in inputs]
    kv_deviation(*inputs, backend=backend)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(inputs, before, strict=True))


def test_shapes_that_do_not_fit_are_refused(device, rng):
    inputs = _inputs(4, 2, 16, torch.float32, device, rng)
    for index, wrong, message in (
        (0, inputs[0][0], r"fresh_keys must be \(tokens, kv_heads, head_dim\)"),
        (1, inputs[1][:3], r"fresh_values must be \(4, 2, 16\) like fresh_keys, got \(3, 2, 16\)"),
        (3, inputs[3][:, :1], r"cached_values must be"),
        (2, inputs[2].transpose(0, 1).contiguous().transpose(0, 1), "of cached_keys must be contiguous"),
    ):
        with pytest.raises(KernelInputError, match=message):
            kv_deviation(*inputs[:index], wrong, *inputs[index + 1 :])
