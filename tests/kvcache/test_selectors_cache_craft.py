import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragkit.kvcache.selectors_cache_craft import CacheCraft, chunk_budgets, context_impact
from ragkit.kvcache.token_selection import ChunkAttention, ChunkSpan


def _spans(sizes, first_is_exact=True, start=5):
    spans = []
    for index, size in enumerate(sizes):
        spans.append(ChunkSpan(start, start + size, first_is_exact and index == 0))
        start += size
    return spans


class Scene:
    """A prompt with a prefix of 5 tokens and chunks of the given sizes, whose question may not be asked."""

    device = torch.device("cpu")

    def __init__(self, budget, sizes=(10, 20, 30), first_is_exact=True):
        self.budget = budget
        self.spans = _spans(sizes, first_is_exact)

    def question_mass(self, layers, repaired=None):
        pytest.fail("the question is not asked")


class Fresh:
    """The tokens of a layer with a given attention; `asked` counts how often it was wanted."""

    def __init__(self, attention):
        self.attention, self.asked = attention, 0

    def deviation(self):
        pytest.fail("the deviation is not wanted")

    def chunk_attention(self):
        self.asked += 1
        return self.attention


def _attention(tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return ChunkAttention(*(torch.rand(tokens, generator=rng) for _ in range(3)))


def _chosen(scene, attention, selector=None):
    selector = selector or CacheCraft()
    positions = selector.choose(scene)
    kept = selector.narrow(scene, 1, positions, Fresh(attention))
    return positions if kept is None else positions[kept]


def _of_chunks(scene, positions):
    return [sum(span.start <= position < span.stop for position in positions.tolist()) for span in scene.spans]


@pytest.mark.parametrize("budget", [0, 1, 7, 49, 50, 51, 59, 60])
@pytest.mark.parametrize("first_is_exact", [True, False])
def test_exactly_the_budget_is_chosen_of_chunks_only(budget, first_is_exact):
    chosen = _chosen(Scene(budget, first_is_exact=first_is_exact), _attention(60))
    assert len(chosen) == budget
    assert bool((chosen.diff() > 0).all())
    assert budget == 0 or 5 <= int(chosen[0]) <= int(chosen[-1]) < 65


@given(
    st.lists(st.tuples(st.integers(0, 400), st.floats(0.5, 1.0)), min_size=1, max_size=40),
    st.floats(0, 1),
    st.booleans(),
)
def test_budgets_of_chunks_sum_exactly_and_none_is_above_its_size(chunks, ratio, first_is_exact):
    sizes, impacts = [size for size, _ in chunks], [impact for _, impact in chunks]
    budget = math.floor(ratio * sum(sizes))
    parts = chunk_budgets(_spans(sizes, first_is_exact), impacts, budget)
    assert sum(parts) == budget
    assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
    if first_is_exact:
        assert parts[0] == max(0, budget - sum(sizes[1:]))


def test_budgets_follow_the_size_and_the_impact_of_the_context():
    spans = _spans([50, 100, 100, 200], first_is_exact=False)
    assert chunk_budgets(spans, [0.5, 0.5, 0.75, 0.5], 100) == [10, 20, 30, 40]


def test_what_would_exceed_a_chunk_goes_to_the_others_in_the_same_proportion():
    spans = _spans([10, 100, 100], first_is_exact=False)
    # alpha * 1.0 would be above 1 for the first, so 10 of 130 are its own, and 120 are shared as 0.5 to 0.7
    assert chunk_budgets(spans, [1.0, 0.5, 0.7], 130) == [10, 50, 70]


def test_rounding_gives_what_is_left_to_the_largest_remainders_and_of_equal_ones_to_the_earlier():
    spans = _spans([10, 10, 10], first_is_exact=False)
    assert chunk_budgets(spans, [0.5, 0.5, 0.5], 10) == [4, 3, 3]
    assert chunk_budgets(spans, [0.5, 0.6, 0.9], 10) == [3, 3, 4]  # 2.5, 3, 4.5


def test_the_impact_of_a_context_is_the_sigmoid_of_the_ratio_of_its_mean_weights():
    assert context_impact(0.0, 0.3) == 0.5
    assert context_impact(0.02, 0.01) == pytest.approx(1 / (1 + math.exp(-2)))
    assert context_impact(0.0, 0.0) == 0.5
    assert context_impact(0.1, 0.0) == 1.0


def test_an_exact_chunk_is_chosen_only_when_nothing_else_is_left():
    attention = _attention(60)
    attention.inter[:10] = 100.0
    assert _of_chunks(Scene(50), _chosen(Scene(50), attention)) == [0, 20, 30]
    assert _of_chunks(Scene(53), _chosen(Scene(53), attention)) == [3, 20, 30]
    assert _of_chunks(Scene(20), _chosen(Scene(20, first_is_exact=False), attention))[0] > 0


def test_the_tokens_of_highest_inter_attention_are_taken_within_each_chunk():
    attention = _attention(60)
    attention.density.zero_()  # every chunk matters alike
    attention.inter.zero_()
    attention.inter[[12, 17, 35, 41, 50]] = torch.tensor([1.0, 2.0, 7.0, 9.0, 8.0])
    assert _chosen(Scene(5), attention).tolist() == [17, 22, 40, 46, 55]


def test_of_equal_attention_the_earlier_tokens_are_taken():
    attention = ChunkAttention(*torch.zeros(3, 60))
    assert _chosen(Scene(5), attention).tolist() == [15, 16, 35, 36, 37]


def test_chunks_that_read_earlier_ones_more_get_more():
    attention = ChunkAttention(torch.rand(60), torch.zeros(60), torch.ones(60))
    attention.density[10:30] = 5 / 20  # a / b is 5 in the second chunk
    impact = 1 / (1 + math.exp(-5))
    second = 20 * impact / (20 * impact + 30 * 0.5) * 20
    assert _of_chunks(Scene(20), _chosen(Scene(20), attention)) == [0, round(second), 20 - round(second)]


def _by_the_paper(scene, attention):
    """The choice written out: loops over chunks and tokens, alpha by bisection."""
    inter, density, intra = (part.double().tolist() for part in attention)
    first = scene.spans[0].start
    tokens = [range(span.start - first, span.stop - first) for span in scene.spans]
    impacts = []
    for span, members in zip(scene.spans, tokens, strict=True):
        a = sum(density[token] for token in members) / len(members)
        b = sum(intra[token] for token in members) / len(members) ** 2
        overlap = 1.0 if span.is_exact else 0.0
        impacts.append(1 / (1 + math.exp(-a / b)) * (1 - overlap))
    low, high = 0.0, 1e6
    for _ in range(200):
        alpha = (low + high) / 2
        shares = [min(1.0, alpha * impact) * len(members) for impact, members in zip(impacts, tokens, strict=True)]
        low, high = (alpha, high) if sum(shares) < scene.budget else (low, alpha)
    parts = [math.floor(share + 1e-7) for share in shares]
    for index in sorted(range(len(parts)), key=lambda index: parts[index] - shares[index])[: scene.budget - sum(parts)]:
        parts[index] += 1
    best = [
        sorted(members, key=lambda token: -inter[token])[:part] for members, part in zip(tokens, parts, strict=True)
    ]
    return sorted(first + token for chosen in best for token in chosen)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [13, 40, 90])
@pytest.mark.parametrize("first_is_exact", [True, False])
def test_the_choice_is_that_of_the_paper(seed, budget, first_is_exact):
    scene, attention = Scene(budget, (10, 20, 30, 7, 41), first_is_exact), _attention(108, seed)
    attention.density.mul_(torch.arange(1, 109) / 500)
    assert _chosen(scene, attention).tolist() == _by_the_paper(scene, attention)


def test_attention_is_measured_once_at_the_check_layer():
    scene, fresh, selector = Scene(9), Fresh(_attention(60)), CacheCraft(check_layer=2)
    positions = selector.choose(scene)
    assert positions.tolist() == list(range(5, 65))
    assert [selector.narrow(scene, layer, positions, fresh) is None for layer in range(4)] == [True, True, False, True]
    assert fresh.asked == 1


def test_a_budget_of_nothing_or_everything_measures_nothing():
    for budget in (0, 60):
        scene, fresh = Scene(budget), Fresh(None)
        positions = CacheCraft().choose(scene)
        assert len(positions) == budget
        assert CacheCraft().narrow(scene, 1, positions, fresh) is None
        assert fresh.asked == 0


def test_two_choices_are_the_same():
    assert torch.equal(_chosen(Scene(17), _attention(60)), _chosen(Scene(17), _attention(60)))
