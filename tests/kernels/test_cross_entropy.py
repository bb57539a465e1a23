import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.cross_entropy import cross_entropy, cross_entropy_torch
from ragkit.kernels.testing import EDGE_TOKENS, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(tokens, vocab_size, dtype, device, rng):
    logits = (torch.randn(tokens, vocab_size, device=device, generator=rng) * 6).to(dtype)
    targets = torch.randint(0, vocab_size, (tokens,), device=device, generator=rng)
    return guarded(logits), targets


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(tokens, dtype, device, rng):
    # Both start from the same rounded logits and compute in fp32, so the type of the logits does not widen the bound.
    logits, targets = inputs(tokens, 129, dtype, device, rng)
    found = cross_entropy(logits, targets, backend=Backend.TRITON)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, cross_entropy_torch(logits, targets), rtol=1e-5, atol=1e-5)


def test_a_vocabulary_of_several_blocks_is_summed_as_a_whole(device, rng):
    logits, targets = inputs(3, 2 * 4096 + 57, torch.bfloat16, device, rng)
    targets[0] = 2 * 4096 + 56
    found = cross_entropy(logits, targets, backend=Backend.TRITON)
    torch.testing.assert_close(found, cross_entropy_torch(logits, targets), rtol=1e-5, atol=1e-5)


def test_large_logits_neither_overflow_nor_hide_the_others(device):
    logits = torch.tensor([[3e4, 3e4, -3e4], [-3e4, -3e4, -3e4]], device=device)
    found = cross_entropy(logits, torch.tensor([0, 2], device=device), backend=Backend.TRITON)
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0], device=device).log())


def test_tokens_that_cannot_come_count_for_nothing(device):
    logits = torch.tensor([[float("-inf"), 1.0, 1.0]], device=device)
    found = cross_entropy(logits, torch.tensor([1], device=device), backend=Backend.TRITON)
    torch.testing.assert_close(found, torch.tensor([2.0], device=device).log())


def test_a_logit_that_is_not_a_number_shows_in_the_loss(device):
    logits = torch.tensor([[float("nan"), 1.0, 1.0], [0.0, 0.0, 0.0]], device=device)
    found = cross_entropy(logits, torch.tensor([1, 1], device=device), backend=Backend.TRITON)
    assert found.isnan().tolist() == [True, False]


def test_targets_of_another_length_are_refused(device):
    with pytest.raises(KernelInputError, match=r"\(2, 7\) and \(3,\)"):
        cross_entropy(torch.ones(2, 7, device=device), torch.zeros(3, dtype=torch.int64, device=device))
