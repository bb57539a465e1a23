"""The outputs of speculative decoding have the target's distribution: by enumeration, and by chi-square."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.errors import ConfigError
from ragkit.generation.acceptance import Acceptance, Transfer, residual, transferred
from ragkit.generation.draft_tree import ROOT, DraftTree
from ragkit.generation.sampling import Sampler, SamplingConfig, distribution

VOCAB = 5
SAMPLED = SamplingConfig(temperature=0.8, seed=1)
weights = st.lists(st.floats(0, 1), min_size=VOCAB, max_size=VOCAB).filter(lambda row: sum(row) > 0.1)


def normal(row):
    row = torch.as_tensor(row, dtype=torch.float64)
    return row / row.sum()


def chi_square_p(counts, expected):
    """Return the chance of a larger chi-square statistic, by Wilson and Hilferty's approximation."""
    seen = [(count, want) for count, want in zip(counts, expected, strict=True) if want > 0]
    assert all(want > 0 for count, want in zip(counts, expected, strict=True) if count)
    freedom = len(seen) - 1
    statistic = sum((count - want) ** 2 / want for count, want in seen)
    score = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(score / math.sqrt(2))


class Fixed(Acceptance):
    """Random numbers that a test gives, for enumeration."""

    def __init__(self, sampling, uniforms, transfer=None):
        super().__init__(sampling, transfer)
        self._sampler = self
        self._uniforms, self.left = iter(uniforms), None

    def uniform(self):
        return next(self._uniforms)

    def draw(self, probabilities):
        self.left = probabilities / probabilities.sum()
        return 0

    def next(self, logits):
        return self.draw(distribution(logits, self._sampling))


def law_of_rounds(logits, tree, transfer=None):
    """Return the distribution of the first token, over all outcomes of the uniform numbers, for children of the root.

    Each uniform number only decides on one round; so each round's probability is the measure of numbers that accept.
    """
    law, reach = torch.zeros(VOCAB, dtype=torch.float64), 1.0
    for child in range(len(tree)):
        low, high = 0.0, 1.0  # the number below which the child stands, by bisection
        for _ in range(40):
            middle = (low + high) / 2
            accepted = Fixed(SAMPLED, [1 - 1e-15] * child + [middle] + [1 - 1e-15] * len(tree), transfer)
            stands = accepted.accept(logits, tree).nodes[:1] == (child,)
            low, high = (middle, high) if stands else (low, middle)
        law[tree.token_ids[child]] += reach * low
        reach *= 1 - low
    if reach > 1e-12:
        rejected = Fixed(SAMPLED, [1 - 1e-15] * len(tree), transfer)
        rejected.accept(logits, tree)
        law += reach * rejected.left
    return law


def siblings(draws, rows):
    return DraftTree(tuple(draws), (ROOT,) * len(draws), torch.stack(rows))


def logits_for(target, nodes):
    """Return logits whose distribution at `SAMPLED` is `target` in every row."""
    return (target.log() * SAMPLED.temperature).expand(nodes + 1, -1)


@settings(max_examples=8, deadline=None)
@given(weights, weights)
def test_one_drawn_child_leaves_the_target_distribution(target, proposal):
    target, proposal = normal(target), normal(proposal)
    law = torch.zeros_like(target)
    for token in range(VOCAB):
        if proposal[token] > 0:
            tree = siblings([token], [proposal])
            law += proposal[token] * law_of_rounds(logits_for(target, 1), tree)
    torch.testing.assert_close(law, target, rtol=0, atol=1e-9)


@settings(max_examples=3, deadline=None)
@given(weights, weights, weights)
def test_two_children_drawn_from_different_distributions_leave_it(target, first, second):
    target, first, second = normal(target), normal(first), normal(second)
    law = torch.zeros_like(target)
    for one, two in itertools.product(range(VOCAB), repeat=2):
        chance = first[one] * second[two]
        if chance > 0:
            law += chance * law_of_rounds(logits_for(target, 2), siblings([one, two], [first, second]))
    torch.testing.assert_close(law, target, rtol=0, atol=1e-9)


@settings(max_examples=3, deadline=None)
@given(weights, st.lists(st.floats(0.05, 1), min_size=VOCAB, max_size=VOCAB))
def test_two_children_drawn_without_replacement_leave_it(target, proposal):
    target, proposal = normal(target), normal(proposal)
    law = torch.zeros_like(target)
    for one, two in itertools.permutations(range(VOCAB), 2):
        rest = proposal.clone()
        rest[one] = 0
        rest = normal(rest)
        chance = proposal[one] * rest[two]
        law += chance * law_of_rounds(logits_for(target, 2), siblings([one, two], [proposal, rest]))
    torch.testing.assert_close(law, target, rtol=0, atol=1e-9)


@settings(max_examples=8, deadline=None)
@given(weights, weights, st.floats(0, 30))
def test_transfer_gives_exactly_the_transferred_distribution(target, proposal, strength):
    target, proposal = normal(target), normal(proposal)
    transfer = Transfer(strength)
    wanted = transferred(target, proposal, transfer)
    law = torch.zeros_like(target)
    for token in range(VOCAB):
        if proposal[token] > 0:
            law += proposal[token] * law_of_rounds(logits_for(target, 1), siblings([token], [proposal]), transfer)
    torch.testing.assert_close(law, wanted, rtol=0, atol=1e-9)


def test_transfer_is_not_the_target_where_it_has_strength():
    target, proposal = normal([4, 3, 2, 1, 0.1]), normal([1, 1, 1, 6, 1])
    distance = (transferred(target, proposal, Transfer(5.0)) - target).abs().sum() / 2
    assert 0.2 < distance < 0.8
    torch.testing.assert_close(transferred(target, proposal, Transfer(0.0)), target, rtol=0, atol=1e-12)


def test_the_transferred_distribution_is_that_of_the_paper():
    target, proposal = normal([6, 3, 1, 0.5, 0.1]), normal([1, 6, 1, 0.1, 0.1])
    z = target.log()
    moved = (z + 3.0 * (proposal - target)).softmax(-1)
    guard = moved < 0.1 * moved.max()
    assert guard.tolist() == [False, False, True, True, True]
    wanted = normal(torch.where(guard, target, moved))
    torch.testing.assert_close(transferred(target, proposal, Transfer(3.0)), wanted)


def test_eta_of_zero_accepts_what_exact_accepts():
    generator = torch.Generator().manual_seed(3)
    for seed in range(50):
        logits, q = torch.randn(4, VOCAB, generator=generator), torch.randn(3, VOCAB, generator=generator).softmax(-1)
        tree = DraftTree.chain(q.multinomial(1, generator=generator).flatten().tolist(), q)
        sampling = SamplingConfig(temperature=1.0, seed=seed)
        exact = Acceptance(sampling).accept(logits, tree)
        assert Acceptance(sampling, Transfer(0.0)).accept(logits, tree) == exact


# ---------------------------------------------------------------------------------------- whole answers, by chi-square


class Markov:
    """A target and a drafter whose next token depends on the last one."""

    def __init__(self, seed, closeness=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(VOCAB, VOCAB, generator=generator).double() * 1.5
        self.drafts = self.logits + closeness * torch.randn(VOCAB, VOCAB, generator=generator).double()

    def law(self, start, length, sampling):
        """Return the chance of each answer."""
        law = {}
        for answer in itertools.product(range(VOCAB), repeat=length):
            chance, last = 1.0, start
            for token in answer:
                chance *= float(distribution(self.logits[last], sampling)[token])
                last = token
            law[answer] = chance
        return law

    def rows(self, tree, last):
        return self.logits[[last, *tree.token_ids]]


def drawn_chain(markov, last, sampling, sampler, length=3):
    tokens, rows = [], []
    for _ in range(length):
        rows.append(distribution(markov.drafts[last], sampling))
        last = sampler.draw(rows[-1])
        tokens.append(last)
    return DraftTree.chain(tokens, torch.stack(rows))


def drawn_tree(markov, last, sampling, sampler, width=2):
    """Two draws with replacement behind the last token, and two without behind each of them."""
    tokens, parents, rows = [], [], []
    for _ in range(width):
        rows.append(distribution(markov.drafts[last], sampling))
        tokens.append(sampler.draw(rows[-1]))
        parents.append(ROOT)
    for parent in range(width):
        row = distribution(markov.drafts[tokens[parent]], sampling)
        for _ in range(width):
            if row.sum() == 0:
                break
            row = row / row.sum()
            rows.append(row)
            tokens.append(sampler.draw(row))
            parents.append(parent)
            row = row.clone()
            row[tokens[-1]] = 0
    return DraftTree(tuple(tokens), tuple(parents), torch.stack(rows))


def certain_tree(markov, last, sampling, sampler):
    """The most likely two tokens, and the most likely behind each."""
    del sampling, sampler
    first = markov.drafts[last].topk(2).indices.tolist()
    return DraftTree((*first, *(int(markov.drafts[one].argmax()) for one in first)), (ROOT, ROOT, 0, 1))


@pytest.mark.parametrize("drafted", [drawn_chain, drawn_tree, certain_tree])
@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0.9), SamplingConfig(temperature=1.3, top_p=0.8)])
def test_sampled_answers_have_the_distribution_of_the_target(drafted, sampling):
    markov, length, runs = Markov(4), 3, 2500
    law = markov.law(0, length, sampling)
    counts = dict.fromkeys(law, 0)
    sampler, acceptance, accepted = Sampler(SamplingConfig(seed=8)), Acceptance(sampling), 0
    for _ in range(runs):
        answer = []
        while len(answer) < length:
            last = answer[-1] if answer else 0
            tree = drafted(markov, last, sampling, sampler)
            nodes, token = acceptance.accept(markov.rows(tree, last), tree)
            answer += [*(tree.token_ids[node] for node in nodes), token]
            accepted += len(nodes)
        counts[tuple(answer[:length])] += 1
    assert accepted > runs / 2
    frequent = [answer for answer in law if law[answer] * runs >= 5]
    rare = [answer for answer in law if law[answer] * runs < 5]
    observed = [counts[answer] for answer in frequent] + [sum(counts[answer] for answer in rare)]
    expected = [law[answer] * runs for answer in frequent] + [sum(law[answer] for answer in rare) * runs]
    assert chi_square_p(observed, expected) > 1e-3


def test_the_chi_square_test_notices_another_distribution():
    expected = [300.0, 400.0, 300.0]
    assert chi_square_p([301, 402, 297], expected) > 0.9
    assert chi_square_p([350, 400, 250], expected) < 1e-3


# --------------------------------------------------------------------------------------------------- single behaviours


@given(st.integers(0, 10_000))
def test_greedy_follows_the_most_likely_tokens_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(0, 9, (1,), generator=generator))
    parents = [int(torch.randint(ROOT, node, (1,), generator=generator)) if node else ROOT for node in range(count)]
    tokens = torch.randint(0, VOCAB, (count,), generator=generator).tolist()
    tree, logits = DraftTree(tuple(tokens), tuple(parents)), torch.randn(count + 1, VOCAB, generator=generator)
    nodes, token = Acceptance(SamplingConfig()).accept(logits, tree)
    before = ROOT
    for node in nodes:
        assert tree.parents[node] == before
        assert tree.token_ids[node] == int(logits[before + 1].argmax())
        before = node
    assert token == int(logits[before + 1].argmax())
    assert token not in [tree.token_ids[child] for child in tree.children(before)]


def test_certain_drafts_give_the_tokens_that_the_seed_gives_without_them():
    markov, sampling = Markov(2), SamplingConfig(temperature=1.0, seed=11)
    sampler, plain, last = Sampler(sampling), [], 0
    for _ in range(200):
        last = sampler.next(markov.logits[last])
        plain.append(last)
    acceptance, answer = Acceptance(sampling), []
    while len(answer) < 200:
        last = answer[-1] if answer else 0
        tree = certain_tree(markov, last, sampling, None)
        nodes, token = acceptance.accept(markov.rows(tree, last), tree)
        answer += [*(tree.token_ids[node] for node in nodes), token]
    assert answer[:200] == plain


def test_greedy_transfer_takes_the_most_likely_transferred_token():
    logits = torch.tensor([[2.0, 1.9, 0, 0, 0], [0, 0, 0, 3.0, 0]])
    teacher = normal([0, 1, 0, 0, 0]).unsqueeze(0)
    tree = DraftTree.chain([1], teacher)
    assert Acceptance(SamplingConfig()).accept(logits, tree) == ((), 0)
    assert Acceptance(SamplingConfig(), Transfer(5.0)).accept(logits, tree) == ((0,), 3)


def test_behind_equal_siblings_all_their_children_are_tried():
    # Both children of the root are token 1; what was drawn behind the second counts too.
    sure = torch.eye(VOCAB, dtype=torch.float64)
    tree = DraftTree((1, 1, 2, 3), (ROOT, ROOT, 0, 1), sure[[1, 1, 2, 3]])
    logits = torch.full((5, VOCAB), -100.0)
    logits[0, 1], logits[1, 3], logits[2, 3], logits[4, 4] = 100.0, 100.0, 100.0, 100.0
    nodes, token = Acceptance(SAMPLED).accept(logits, tree)
    assert (nodes, token) == ((1, 3), 4)


def test_equal_distributions_leave_everything_and_accept_always():
    p = normal([1, 2, 3, 4, 5])
    assert torch.equal(residual(p, p), p)
    tree = DraftTree.chain([3, 3, 3], p.expand(3, -1))
    for seed in range(20):
        acceptance = Acceptance(SamplingConfig(temperature=1.0, seed=seed))
        assert acceptance.accept(p.log().expand(4, -1), tree).nodes == (0, 1, 2)


@pytest.mark.parametrize(("setting", "value"), [("strength", -1.0), ("strength", math.inf), ("tail", 1.5)])
def test_impossible_transfers_are_refused(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} of transfer"):
        Transfer(**{setting: value})
