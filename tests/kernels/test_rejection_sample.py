import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.generation.acceptance import Acceptance
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.sampling import SamplingConfig
from ragkit.kernels.backend import Backend
from ragkit.kernels.rejection_sample import rejection_sample, rejection_sample_torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = list(Backend)


def _inputs(requests, nodes, vocab, dtype, device, rng, temperature=1.0, *, drawn=True):
    """Chains of which some are shorter; logits behind their ends are NaN."""
    logits = torch.randn(requests, nodes + 1, vocab, device=device, generator=rng) * 2
    lengths = torch.tensor([nodes - index % (nodes + 1) for index in range(requests)], device=device)
    probabilities = None
    drafts = torch.randint(0, vocab, (requests, nodes), device=device, generator=rng)
    if drawn:
        noise = torch.randn(requests, nodes, vocab, device=device, generator=rng)
        probabilities = (logits[:, :nodes] + noise).softmax(-1).contiguous()
        if nodes:
            drafts = torch.multinomial(probabilities.flatten(0, 1), 1, generator=rng).view(requests, nodes)
    else:  # some are right
        drafts = torch.where(drafts % 3 > 0, logits[:, :nodes].argmax(-1), drafts)
    for request, length in enumerate(lengths.tolist()):
        logits[request, length + 1 :] = torch.nan
    uniforms = torch.rand(requests, nodes + 1, 2, device=device, generator=rng)
    temperatures = torch.full((requests,), temperature, device=device)
    return [logits.to(dtype), drafts, lengths, temperatures, uniforms, probabilities]


def _assert_same(got, expected):
    assert got.accepted.tolist() == expected.accepted.tolist()
    assert got.tokens.tolist() == expected.tokens.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("drawn", [True, False])
def test_matches_the_definition(drawn, temperature, dtype, device, rng):
    inputs = _inputs(12, 4, 300, dtype, device, rng, temperature, drawn=drawn)
    _assert_same(rejection_sample(*inputs, backend=Backend.TRITON), rejection_sample_torch(*inputs))


@pytest.mark.parametrize("vocab", [1, 15, 8191, 8192, 20000])
@pytest.mark.parametrize("drawn", [True, False])
def test_matches_the_definition_for_every_size_of_a_vocabulary(drawn, vocab, device, rng):
    inputs = _inputs(3, 2, vocab, torch.float32, device, rng, drawn=drawn)
    _assert_same(rejection_sample(*inputs, backend=Backend.TRITON), rejection_sample_torch(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_of_different_temperatures_stand_beside_each_other(backend, device, rng):
    inputs = _inputs(4, 3, 50, torch.float32, device, rng)
    inputs[3] = torch.tensor([0.0, 1.0, 0.0, 0.5], device=device)
    together = rejection_sample(*inputs, backend=backend)
    for index in range(4):
        alone = rejection_sample(*(part[index : index + 1] for part in inputs), backend=backend)
        assert (int(alone.accepted), int(alone.tokens)) == (int(together.accepted[index]), int(together.tokens[index]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_drafts_a_token_is_drawn_from_the_model(backend, device, rng):
    logits = torch.tensor([[[0.0, 1.0, 2.0]]], device=device).expand(1000, 1, 3).contiguous()
    uniforms = torch.linspace(0, 0.9999, 1000, device=device).view(1000, 1, 1).repeat(1, 1, 2)
    outcome = rejection_sample(
        logits, torch.empty((1000, 0), dtype=torch.int64, device=device),
        torch.zeros(1000, dtype=torch.int64, device=device), torch.ones(1000, device=device), uniforms,
        backend=backend,
    )  # fmt: skip
    share = torch.bincount(outcome.tokens, minlength=3) / 1000
    torch.testing.assert_close(share.cpu(), torch.tensor([0.0900, 0.2447, 0.6652]), rtol=0, atol=2e-3)
    assert int(outcome.accepted.sum()) == 0


@pytest.mark.parametrize("drawn", [True, False])
def test_the_first_token_has_the_distribution_of_the_model(drawn, device, rng):
    count, vocab = 40_000, 6
    target = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05, 0.0], device=device)
    draft = torch.tensor([0.1, 0.1, 0.5, 0.1, 0.1, 0.1], device=device)
    logits = target.log().expand(count, 2, vocab).contiguous()
    if drawn:
        drafts = torch.multinomial(draft, count, replacement=True, generator=rng).view(count, 1)
        probabilities = draft.expand(count, 1, vocab).contiguous()
    else:
        drafts, probabilities = torch.full((count, 1), 1, device=device), None
    ones = torch.ones(count, device=device)
    uniforms = torch.rand(count, 2, 2, device=device, generator=rng)
    outcome = rejection_sample(logits, drafts, ones.long(), ones, uniforms, probabilities, backend=Backend.TORCH)
    first = torch.where(outcome.accepted > 0, drafts[:, 0], outcome.tokens)
    expected = target * count
    observed = torch.bincount(first, minlength=vocab).float()
    assert int(observed[5]) == 0
    chi_square = float(((observed - expected)[:5].square() / expected[:5]).sum())
    assert chi_square < 18.5  # 4 degrees of freedom, one in a thousand
    stood = float((outcome.accepted > 0).float().mean())
    overlap = float(torch.minimum(target, draft).sum()) if drawn else 0.3
    assert abs(stood - overlap) < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_certain_drafts_change_no_token_of_the_answer(backend, device, rng):
    inputs = _inputs(20, 3, 30, torch.float32, device, rng, drawn=False)
    inputs[2].fill_(3)
    inputs[0] = torch.nan_to_num(inputs[0], nan=0.0)
    outcome = rejection_sample(*inputs, backend=backend)
    nothing = [*inputs[:2], torch.zeros_like(inputs[2]), *inputs[3:]]
    first = torch.where(outcome.accepted > 0, inputs[1][:, 0], outcome.tokens)
    assert torch.equal(rejection_sample(*nothing, backend=backend).tokens, first)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drawn", [True, False])
def test_as_many_drafts_stand_as_the_host_accepts_with_the_same_numbers(drawn, temperature, device, rng, monkeypatch):
    inputs = _inputs(30, 4, 40, torch.float32, device, rng, temperature, drawn=drawn)
    inputs[2].fill_(4)
    inputs[0] = torch.nan_to_num(inputs[0], nan=0.0)
    logits, drafts, _, _, uniforms, probabilities = (None if part is None else part.cpu() for part in inputs)
    if not drawn and temperature:  # the host draws in the order of probability: ask for the same token by the order
        order = logits.argsort(-1, descending=True)
        logits = logits.gather(-1, order)
        drafts = (order[:, :4] == drafts.unsqueeze(2)).int().argmax(-1)
        inputs[0], inputs[1] = logits.to(device), drafts.to(device)
    got = rejection_sample(*inputs, backend=Backend.TRITON)
    for index in range(30):
        acceptance = Acceptance(SamplingConfig(temperature=temperature))
        tests = iter(uniforms[index, :, 0 if drawn else 1].tolist())
        monkeypatch.setattr(acceptance._sampler, "uniform", lambda tests=tests: next(tests))
        tree = DraftTree.chain(drafts[index].tolist(), None if probabilities is None else probabilities[index])
        try:
            accepted = acceptance.accept(logits[index], tree)
        except StopIteration:  # all stand, and the number for the token behind them is not among these
            assert int(got.accepted[index]) == 4
            continue
        assert len(accepted.nodes) == int(got.accepted[index])
        if temperature == 0 or not drawn:
            assert accepted.token_id == int(got.tokens[index])


def test_a_draft_that_the_model_equals_always_stands(device, rng):
    inputs = _inputs(50, 3, 40, torch.float32, device, rng)
    inputs[2].fill_(3)
    inputs[0] = torch.nan_to_num(inputs[0], nan=0.0)
    inputs[5] = inputs[0][:, :3].softmax(-1).contiguous()
    inputs[4] *= 0.999
    assert rejection_sample(*inputs, backend=Backend.TRITON).accepted.tolist() == [3] * 50


def test_no_requests_give_nothing(device, rng):
    inputs = [None if part is None else part[:0] for part in _inputs(1, 2, 30, torch.float32, device, rng)]
    assert rejection_sample(*inputs, backend=Backend.TRITON).tokens.shape == (0,)


def test_numbers_of_another_shape_are_refused(device, rng):
    inputs = _inputs(2, 2, 30, torch.float32, device, rng)
    inputs[4] = inputs[4][..., 0]
    with pytest.raises(KernelInputError, match="uniforms must be"):
        rejection_sample(*inputs)
