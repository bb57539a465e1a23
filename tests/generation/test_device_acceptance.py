"""Chains that a drafter drew, decided on a device: there `Acceptance` asks `rejection_sample`."""

import pytest
import torch

from ragkit.generation.acceptance import Acceptance
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.sampling import SamplingConfig, distribution

VOCAB = 6
SAMPLED = SamplingConfig(temperature=0.8, seed=1)
LOGITS = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5
DRAFTS = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(5)).softmax(-1)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _outcomes(device, count):
    """Return the tokens that each of `count` drafts of two tokens gave: those that stood and the one behind them."""
    acceptance, drawn = Acceptance(SAMPLED), torch.Generator().manual_seed(6)
    logits, shares = LOGITS.to(device), DRAFTS.to(device)
    for _ in range(count):
        tokens = torch.multinomial(DRAFTS, 1, generator=drawn).flatten().tolist()
        nodes, token = acceptance._on_device(logits, DraftTree.chain(tokens, shares), shares)
        yield [*(tokens[node] for node in nodes), token]


def _assert_drawn_from(counts, expected):
    expected = expected * counts.sum()
    statistic = float(((counts - expected).square() / expected).sum())
    assert statistic < 20.5  # 5 degrees of freedom, one in a thousand


def test_the_first_and_the_second_token_have_the_distribution_of_the_model(device):
    outcomes = list(_outcomes(device, 3000))
    first = torch.bincount(torch.tensor([tokens[0] for tokens in outcomes]), minlength=VOCAB)
    _assert_drawn_from(first, distribution(LOGITS[0], SAMPLED))
    # Behind the first draft the model's logits are those of node 0, whatever it was.
    second = torch.bincount(torch.tensor([tokens[1] for tokens in outcomes if len(tokens) > 1]), minlength=VOCAB)
    _assert_drawn_from(second, distribution(LOGITS[1], SAMPLED))


def test_the_same_seed_gives_the_same_tokens(device):
    assert list(_outcomes(device, 20)) == list(_outcomes(device, 20))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_chain_on_a_gpu_is_decided_there(monkeypatch):
    shares = DRAFTS.cuda()
    acceptance = Acceptance(SAMPLED)
    monkeypatch.setattr(acceptance, "_by_rounds", lambda *arguments: pytest.fail("decided by the host"))
    acceptance.accept(LOGITS.cuda(), DraftTree.chain([1, 2], shares))
