import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.dequantize_kv import dequantize_kv_torch
from ragkit.kernels.quantize_kv import _quantize_kv_kernel, empty_codes, quantize_kv, quantize_kv_torch
from ragkit.kernels.testing import CANARY, EDGE_TOKENS, guarded

KEYS, VALUES = (16, 1), (1, 8)  # (token_group, channel_group)


def _sample(tokens, heads, head_dim, dtype, device, rng):
    x = torch.randn(tokens, heads, head_dim, device=device, generator=rng)
    x[..., 0] = x[..., 0] * 9 + 60  # keys before RoPE have such channels
    return guarded(x.to(dtype))


def _worst_share(x, quantized, token_group):
    # The largest error in scales, beyond what fp32 rounds; half a scale is the promise.
    back = torch.empty(x.shape, device=x.device)
    dequantize_kv_torch(quantized, back, token_group=token_group)
    scale = quantized.scale.float().repeat_interleave(token_group, 0)[: len(x)]
    scale = scale.repeat_interleave(x.shape[2] // scale.shape[2], 2)
    return float((((back - x.float()).abs() - 2e-7 * x.float().abs()) / scale).max()) if x.numel() else 0.0


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [KEYS, VALUES])
@pytest.mark.parametrize("backend", list(Backend))
def test_the_error_is_at_most_half_a_scale(tokens, bits, groups, backend, device, rng):
    x = _sample(tokens, 3, 16, torch.float32, device, rng)
    got = quantize_kv(x, bits=bits, token_group=groups[0], channel_group=groups[1], backend=backend)
    assert _worst_share(x, got, groups[0]) <= 0.5002


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [(32, 1), (1, 8), (4, 8)])
def test_the_kernel_matches_the_definition(head_dim, bits, groups, device, rng):
    x = _sample(37, 2, head_dim, torch.bfloat16, device, rng)
    options = {"bits": bits, "token_group": groups[0], "channel_group": groups[1]}
    got, expected = quantize_kv(x, **options, backend=Backend.TRITON), quantize_kv_torch(x, **options)
    assert got.codes.shape == expected.codes.shape
    for mine, reference in ((got.scale, expected.scale), (got.zero, expected.zero)):
        assert torch.allclose(mine.float(), reference.float(), rtol=2e-3, atol=1e-7)
    assert _worst_share(x, got, groups[0]) <= 0.5002
    # A division that rounds otherwise may move a code that lies between two by one; no more.
    differing = (got.codes != expected.codes).float().mean()
    assert differing <= 0.002


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-7, 6e4, -6e4])
@pytest.mark.parametrize("backend", list(Backend))
def test_constant_groups_come_back_closely(value, backend, device):
    x = torch.full((4, 1, 8), value, device=device)
    got = quantize_kv(x, bits=4, token_group=4, channel_group=1, backend=backend)
    assert bool(torch.isfinite(got.scale).all())
    back = torch.empty_like(x)
    dequantize_kv_torch(got, back, token_group=4)
    assert float((back - x).abs().max()) <= abs(value) * 1e-4 + 6e-8


@pytest.mark.parametrize("backend", list(Backend))
def test_four_bits_pack_what_rotation_turns_together(backend, device):
    x = torch.arange(16, device=device).float().view(1, 1, 16)
    got = quantize_kv(x, bits=4, token_group=1, channel_group=8, backend=backend)
    back = torch.empty_like(x)
    dequantize_kv_torch(got, back, token_group=1)
    assert torch.equal(got.codes[0, 0] & 15, (got.codes[0, 0] >> 4))  # 0..7 and 8..15 have the same codes
    assert float((back - x).abs().max()) < 0.3


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 37, 64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [KEYS, VALUES])
@pytest.mark.parametrize("backend", list(Backend))
def test_groups_go_to_their_slots_and_nothing_else_is_written(tokens, bits, groups, backend, device, rng):
    x = _sample(tokens, 3, 16, torch.float32, device, rng)
    options = {"bits": bits, "token_group": groups[0], "channel_group": groups[1]}
    fresh = quantize_kv(x, **options, backend=backend)
    out = empty_codes((160, 3, 16), bits, groups[0], groups[1], device)
    for part in out:
        part.fill_(CANARY)
    slots = torch.randperm(len(out.scale), device=device, generator=rng)[: len(fresh.scale)]
    assert quantize_kv(x, **options, out=out, slots=slots, backend=backend) is out
    rows = (slots.unsqueeze(1) * groups[0] + torch.arange(groups[0], device=device)).flatten()[:tokens]
    for mine, expected, at in zip(out, fresh, (rows, slots, slots), strict=True):
        assert torch.equal(mine[at], expected)
        untouched = torch.ones(len(mine), dtype=torch.bool, device=device)
        untouched[at] = False
        assert bool((mine[untouched] == CANARY).all())


def test_a_target_that_does_not_fit_is_refused(device):
    x = torch.zeros(20, 2, 16, device=device)
    options = {"bits": 8, "token_group": 16, "channel_group": 1}
    out = empty_codes((64, 2, 16), 8, 16, 1, device)
    with pytest.raises(KernelInputError, match="given together"):
        quantize_kv(x, **options, out=out)
    with pytest.raises(KernelInputError, match=r"slots must be \(2,\) int64"):
        quantize_kv(x, **options, out=out, slots=torch.arange(3, device=device))
    with pytest.raises(KernelInputError, match="out must be of"):
        quantize_kv(x, **options, out=empty_codes((64, 3, 16), 8, 16, 1, device), slots=torch.arange(2, device=device))


def test_a_view_over_fused_heads_is_taken(device, rng):
    fused = torch.randn(20, 6 * 16, device=device, generator=rng)
    keys = fused.unflatten(1, (6, 16))[:, 2:4]
    got = quantize_kv(keys, bits=8, token_group=16, channel_group=1, backend=Backend.TRITON)
    assert torch.equal(got.scale, quantize_kv(keys.contiguous(), bits=8, token_group=16, channel_group=1).scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "4 or 8 bits"),
        ({"token_group": 12}, "power of two"),
        ({"channel_group": 16}, "divide half"),
        ({"channel_group": 0}, "power of two"),
    ],
)
def test_impossible_groups_are_refused(change, message, device):
    options = {"bits": 8, "token_group": 4, "channel_group": 1} | change
    with pytest.raises(KernelInputError, match=message):
        quantize_kv(torch.zeros(4, 1, 16, device=device), **options)


def test_no_number_of_tokens_has_a_kernel_compiled_for_it():
    assert _quantize_kv_kernel._shares[_quantize_kv_kernel._names.index("tokens")]
