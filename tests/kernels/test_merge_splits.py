import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels import merge_splits as module
from ragkit.kernels.backend import Backend
from ragkit.kernels.merge_splits import MergeLaunch, merge_launch, merge_splits, merge_splits_torch
from ragkit.kernels.testing import assert_matches, canaried, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _parts(tokens, heads, splits, head_dim, device, rng):
    partial = torch.randn(tokens, heads, splits, head_dim, device=device, generator=rng)
    weights = torch.randn(tokens, heads, splits, device=device, generator=rng) * 5
    return guarded(partial), guarded(weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "splits"), [(0, 2), (1, 1), (3, 2), (5, 7)])
def test_matches_the_definition_and_writes_nothing_else(tokens, splits, dtype, device, rng):
    partial, weights = _parts(tokens, 3, splits, 80, device, rng)
    out, check = canaried((tokens, 3, 80), dtype, device)
    merge_splits(partial, weights, out, backend=Backend.TRITON)
    check()
    assert_matches(out, merge_splits_torch(partial, weights))


@pytest.mark.parametrize(("head_dim", "splits"), [(16, 3), (48, 32), (80, 5), (128, 33), (256, 2)])
def test_warps_that_merge_a_few_channels_each_merge_all_of_them(head_dim, splits, device, rng):
    partial, weights = _parts(2, 3, splits, head_dim, device, rng)
    weights[0, 1] = -math.inf
    out, check = canaried((2, 3, head_dim), torch.float32, device)
    log_sums, check_sums = canaried((2, 3), torch.float32, device)
    merge_splits(partial, weights, out, log_sums, by_warp=True, backend=Backend.TRITON)
    check()
    check_sums()
    assert_matches(out, merge_splits_torch(partial, weights))
    assert_matches(log_sums, weights.double().exp2().sum(-1).log2())


def test_parts_merge_into_attention_over_all_keys(device, rng):
    scores = torch.randn(4, 2, 60, device=device, generator=rng)
    values = torch.randn(60, 16, device=device, generator=rng)
    parts = scores.unflatten(2, (5, 12))
    partial = torch.einsum("thsr,srd->thsd", parts.softmax(-1), values.unflatten(0, (5, 12)))
    out = torch.empty(4, 2, 16, device=device)
    weights = parts.logsumexp(-1) / math.log(2)
    merge_splits(partial.contiguous(), weights.contiguous(), out, backend=Backend.TRITON)
    assert_matches(out, scores.softmax(-1) @ values, reduced=4)


@pytest.mark.parametrize("backend", list(Backend))
def test_a_part_in_which_nothing_was_seen_counts_for_nothing(backend, device, rng):
    partial, weights = _parts(2, 1, 3, 32, device, rng)
    partial[:, :, 1], weights[:, :, 1] = 0.0, -math.inf
    weights[1] = -math.inf
    out = torch.empty(2, 1, 32, device=device)
    merge_splits(partial, weights, out, backend=backend)
    share = weights[0, 0, [0, 2]].mul(math.log(2)).softmax(-1)
    assert_matches(out[0, 0], share @ partial[0, 0, [0, 2]], reduced=4)
    assert torch.equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("backend", list(Backend))
def test_log_sums_are_those_of_all_parts(backend, device, rng):
    partial, weights = _parts(3, 2, 5, 16, device, rng)
    weights[0, :, 1:4], weights[2, 1] = -math.inf, -math.inf
    log_sums, check = canaried((3, 2), torch.float32, device)
    merge_splits(partial, weights, torch.empty(3, 2, 16, device=device), log_sums, backend=backend)
    check()
    assert_matches(log_sums, weights.double().exp2().sum(-1).log2())


@pytest.mark.parametrize("wanted", list(MergeLaunch))
def test_where_nothing_launches_early_the_merge_comes_after_the_parts(wanted, monkeypatch):
    assert merge_launch(wanted, torch.device("cpu")) is MergeLaunch.AFTER
    monkeypatch.setattr(module, "can_launch_early", lambda device: True)
    assert merge_launch(wanted, torch.device("cuda")) is wanted


def test_shapes_that_do_not_fit_are_refused(device, rng):
    partial, weights = _parts(2, 4, 3, 32, device, rng)
    with pytest.raises(KernelInputError, match="do not fit"):
        merge_splits(partial, weights, torch.empty(2, 4, 16, device=device))
    with pytest.raises(KernelInputError, match=r"log_sums must be \(2, 4\)"):
        merge_splits(partial, weights, torch.empty(2, 4, 32, device=device), torch.empty(4, 2, device=device))
    with pytest.raises(KernelInputError, match="contiguous"):
        merge_splits(partial, weights, torch.empty(4, 2, 32, device=device).transpose(0, 1))
