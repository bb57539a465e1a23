import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.dequantize_kv import dequantize_kv, dequantize_kv_torch
from ragkit.kernels.quantize_kv import QuantizedHeads, quantize_kv_torch
from ragkit.kernels.testing import CANARY, EDGE_TOKENS, assert_matches, canaried

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _quantized(tokens, heads, head_dim, bits, groups, device, rng):
    x = torch.randn(tokens, heads, head_dim, device=device, generator=rng)
    return quantize_kv_torch(x, bits=bits, token_group=groups[0], channel_group=groups[1])


def _reference(quantized, shape, token_group, device):
    out = torch.empty(shape, device=device)
    dequantize_kv_torch(quantized, out, token_group=token_group)
    return out


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [(16, 1), (1, 8)])
def test_matches_the_definition_and_writes_nothing_else(tokens, dtype, bits, groups, device, rng):
    quantized = _quantized(tokens, 3, 16, bits, groups, device, rng)
    out, check = canaried((tokens, 3, 16), dtype, device)
    dequantize_kv(quantized, out, token_group=groups[0], backend=Backend.TRITON)
    check()
    assert_matches(out, _reference(quantized, out.shape, groups[0], device))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_matches_the_definition_for_every_head_size(head_dim, bits, device, rng):
    quantized = _quantized(9, 2, head_dim, bits, (4, 8), device, rng)
    out = torch.empty(9, 2, head_dim, device=device)
    dequantize_kv(quantized, out, token_group=4, backend=Backend.TRITON)
    assert_matches(out, _reference(quantized, out.shape, 4, device))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [(64, 1), (1, 16), (2, 1), (1, 1), (1, 2)])
def test_many_programs_of_several_rows_match_the_definition(bits, groups, device, rng):
    quantized = _quantized(333, 3, 96, bits, groups, device, rng)
    out, check = canaried((333, 3, 96), torch.bfloat16, device)
    dequantize_kv(quantized, out, token_group=groups[0], backend=Backend.TRITON)
    check()
    assert_matches(out, _reference(quantized, out.shape, groups[0], device))


@pytest.mark.parametrize("backend", list(Backend))
def test_rows_go_to_their_slots(backend, device, rng):
    quantized = _quantized(20, 2, 16, 4, (16, 1), device, rng)
    pool = torch.full((8, 8, 2, 16), CANARY, device=device)
    slots = torch.randperm(64, device=device, generator=rng)[:20]
    dequantize_kv(quantized, pool.flatten(0, 1), slots, token_group=16, backend=backend)
    rows = pool.flatten(0, 1)
    assert_matches(rows[slots], _reference(quantized, (20, 2, 16), 16, device))
    untouched = torch.ones(64, dtype=torch.bool, device=device)
    untouched[slots] = False
    assert bool((rows[untouched] == CANARY).all())


def test_shapes_that_do_not_fit_are_refused(device, rng):
    quantized = _quantized(20, 2, 16, 4, (16, 1), device, rng)
    out = torch.empty(20, 2, 16, device=device)
    with pytest.raises(KernelInputError, match=r"codes .* do not fit"):
        dequantize_kv(quantized, torch.empty(20, 2, 64, device=device), token_group=16)
    with pytest.raises(KernelInputError, match=r"scales .* do not fit"):
        dequantize_kv(quantized, out, token_group=4)
    with pytest.raises(KernelInputError, match="give their slots"):
        dequantize_kv(quantized, torch.empty(21, 2, 16, device=device), token_group=16)
    with pytest.raises(KernelInputError, match="slots must be"):
        dequantize_kv(quantized, out, torch.arange(3, device=device), token_group=16)
    shifted = QuantizedHeads(quantized.codes.transpose(0, 1).contiguous().transpose(0, 1), *quantized[1:])
    with pytest.raises(KernelInputError, match="contiguous"):
        dequantize_kv(shifted, out, token_group=16)
