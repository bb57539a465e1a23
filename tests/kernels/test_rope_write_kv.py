import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.rope_write_kv import rope_write_kv, rope_write_kv_torch
from ragkit.kernels.testing import CANARY, EDGE_TOKENS, assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _inputs(tokens, q_heads, kv_heads, head_dim, dtype, device, rng, positions=200):
    qkv = guarded(torch.randn(tokens, (q_heads + 2 * kv_heads) * head_dim, device=device, generator=rng).to(dtype))
    heads = qkv.unflatten(1, (-1, head_dim))
    angles = torch.rand(positions, head_dim // 2, device=device, generator=rng) * 6
    pools = [torch.full((8, 16, kv_heads, head_dim), CANARY, device=device, dtype=dtype) for _ in range(2)]
    where = torch.randperm(positions, device=device, generator=rng)[:tokens]
    slots = torch.randperm(8 * 16, device=device, generator=rng)[:tokens]
    queries, keys, values = heads.split([q_heads, kv_heads, kv_heads], dim=1)
    return [queries, keys, values, guarded(where, 10**6), guarded(slots, 10**6), angles.cos(), angles.sin(), *pools]


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate_keys", [False, True])
def test_matches_the_definition(tokens, dtype, rotate_keys, device, rng):
    inputs = _inputs(tokens, 6, 2, 24, dtype, device, rng)
    expected = [tensor.clone() for tensor in inputs]
    rope_write_kv(*inputs, rotate_keys=rotate_keys, backend=Backend.TRITON)
    rope_write_kv_torch(*expected, rotate_keys=rotate_keys)
    for got, reference in zip(inputs, expected, strict=True):
        if got.is_floating_point():
            assert_matches(got, reference.float())


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate_keys", [False, True])
def test_rows_go_to_their_positions_as_well_with_the_keys_rotated(tokens, dtype, rotate_keys, device, rng):
    inputs = _inputs(tokens, 6, 2, 24, dtype, device, rng)
    copies = [torch.full((200, 2, 24), CANARY, device=device, dtype=dtype) for _ in range(2)]
    cos, sin = inputs[5][inputs[3]], inputs[6][inputs[3]]
    first, second = inputs[1].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos[:, None] - second * sin[:, None], second * cos[:, None] + first * sin[:, None]), -1)
    expected = [torch.full_like(one, CANARY, dtype=torch.float32) for one in copies]
    expected[0][inputs[3]], expected[1][inputs[3]] = turned, inputs[2].float()
    others = [tensor.clone() for tensor in inputs]
    for made, backend in ((inputs, Backend.TRITON), (others, Backend.TORCH)):
        for copy in copies:
            copy.fill_(CANARY)
        rope_write_kv(
            *made, rotate_keys=rotate_keys, rotated_keys=copies[0], plain_values=copies[1], backend=backend
        )  # fmt: skip
        for got, reference in zip(copies, expected, strict=True):
            assert_matches(got, reference)
    for got, reference in zip(inputs, others, strict=True):
        if got.is_floating_point():
            assert_matches(got, reference.float())


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (4, 4), (8, 1)])
def test_matches_the_definition_for_every_head_size(head_dim, q_heads, kv_heads, device, rng):
    inputs = _inputs(3, q_heads, kv_heads, head_dim, torch.float32, device, rng)
    expected = [tensor.clone() for tensor in inputs]
    rope_write_kv(*inputs, rotate_keys=True, backend=Backend.TRITON)
    rope_write_kv_torch(*expected, rotate_keys=True)
    for index in (0, 1, 7, 8):
        assert_matches(inputs[index], expected[index])


def test_the_pool_holds_keys_before_rotation_and_nothing_else_changes(device, rng):
    inputs = _inputs(5, 4, 2, 16, torch.float32, device, rng)
    keys, slots, key_pool = inputs[1].clone(), inputs[4], inputs[7]
    rope_write_kv(*inputs, rotate_keys=True, backend=Backend.TRITON)
    rows = key_pool.flatten(0, 1)
    assert torch.equal(rows[slots], keys)
    untouched = torch.ones(len(rows), dtype=torch.bool, device=device)
    untouched[slots] = False
    assert bool((rows[untouched] == CANARY).all())


def test_rotation_by_two_steps_is_rotation_by_their_sum(device, rng):
    inputs = _inputs(4, 2, 2, 32, torch.float32, device, rng)
    frequency = torch.rand(16, device=device, generator=rng)
    angles = torch.outer(torch.arange(200, device=device).float(), frequency)
    inputs[5:7] = angles.cos(), angles.sin()
    start = inputs[0].clone()

    def turn(positions):
        inputs[3] = torch.full((4,), positions, device=device)
        rope_write_kv(*inputs, rotate_keys=False, backend=Backend.TRITON)

    turn(7)
    turn(11)
    twice = inputs[0].clone()
    inputs[0].copy_(start)
    turn(18)
    assert_matches(twice, inputs[0], reduced=16)


def test_a_pool_of_another_shape_is_refused(device, rng):
    inputs = _inputs(2, 2, 2, 16, torch.float32, device, rng)
    inputs[7] = inputs[7][..., :8]
    with pytest.raises(KernelInputError, match="pools must be"):
        rope_write_kv(*inputs, rotate_keys=False)


def test_copies_that_do_not_fit_are_refused(device, rng):
    inputs = _inputs(3, 4, 2, 24, torch.float32, device, rng)
    copy = torch.zeros((200, 2, 24), device=device)
    with pytest.raises(KernelInputError, match="together or not at all"):
        rope_write_kv(*inputs, rotate_keys=False, rotated_keys=copy)
    with pytest.raises(KernelInputError, match=r"plain_values must be \(rows, 2, 24\) contiguous, got \(200, 1, 24\)"):
        rope_write_kv(*inputs, rotate_keys=False, rotated_keys=copy, plain_values=copy[:, :1])
