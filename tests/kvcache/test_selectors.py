import math

import pytest
import torch

from ragkit.config import AUTO_SELECTORS, BlendConfig, SelectorName
from ragkit.errors import ConfigError
from ragkit.kvcache.coverage import Coverage, count_of
from ragkit.kvcache.selectors import make_selector
from ragkit.kvcache.selectors_deviation import DeviationAtOneLayer, DeviationOf, GradualFiltering
from ragkit.kvcache.selectors_question import QuestionAttention, TwoRounds
from ragkit.kvcache.selectors_static import Everything, FirstTokens, NoTokens, RandomTokens
from ragkit.kvcache.token_selection import ChunkSpan, Deviation, evenly_spaced, highest

ALL = {
    "question": QuestionAttention(),
    "question only": QuestionAttention(most_even=0.0),
    "two rounds": TwoRounds(),
    "first": FirstTokens(),
    "random": RandomTokens(),
}


class Scene:
    """A prompt of a prefix of 5 tokens, chunks of the given sizes, and 4 tokens behind."""

    device = torch.device("cpu")

    def __init__(self, budget, sizes=(10, 20, 30), first_is_exact=True, mass=None, coverage=None):
        self.budget = budget if coverage is None else count_of(coverage.most, sum(sizes))
        self.coverage = coverage
        starts = [5 + sum(sizes[:index]) for index in range(len(sizes))]
        self.spans = [
            ChunkSpan(start, start + size, first_is_exact and index == 0)
            for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
        ]
        self.total = sum(sizes) + 9
        self.mass = torch.rand(self.total, generator=torch.Generator().manual_seed(1)) if mass is None else mass
        self.asked = []

    def question_mass(self, layers, repaired=None):
        self.asked.append(None if repaired is None else repaired.tolist())
        return self.mass if repaired is None else self.mass.flip(0)


class Measured:
    """The tokens of a layer, of which only what is given may be asked for."""

    def __init__(self, deviation=None, attention=None):
        self._deviation, self._attention = deviation, attention

    def deviation(self):
        return self._deviation or pytest.fail("nobody may ask for the deviation")

    def chunk_attention(self):
        return self._attention or pytest.fail("nobody may ask for the attention")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("budget", [0, 1, 7, 50, 55, 60])
def test_the_budget_is_met_with_distinct_ascending_positions_of_chunks(name, budget):
    scene = Scene(budget)
    chosen = ALL[name].choose(scene)
    assert len(chosen) == budget
    assert bool((chosen.diff() > 0).all())
    assert budget == 0 or 5 <= int(chosen[0]) <= int(chosen[-1]) < 65


@pytest.mark.parametrize("name", ALL)
def test_an_exact_chunk_is_chosen_only_when_nothing_else_is_left(name):
    assert int(ALL[name].choose(Scene(50)).min()) == 15
    chosen = ALL[name].choose(Scene(53))
    assert int((chosen < 15).sum()) == 3
    assert int(ALL[name].choose(Scene(50, first_is_exact=False)).min()) < 15


def test_the_question_chooses_what_it_looks_at():
    mass = torch.zeros(69)
    mass[[20, 33, 34, 50]] = torch.tensor([1.0, 3.0, 2.0, 4.0])
    mass[:15] = 9.0  # the prefix and the exact chunk
    assert QuestionAttention(most_even=0.0).choose(Scene(3, mass=mass)).tolist() == [33, 34, 50]


def test_a_share_is_spaced_evenly_and_the_rest_is_added():
    scene = Scene(20)
    even = evenly_spaced(scene, 5)
    assert even.tolist() == [15, 25, 35, 45, 55]
    chosen = QuestionAttention(even_spacing=1.0, most_even=0.25).choose(scene)
    assert set(even.tolist()) <= set(chosen.tolist())
    assert scene.asked == [None]


def test_no_more_are_spaced_evenly_than_reach_each_other():
    scene = Scene(20)  # 65 tokens, 15 of them exact
    chosen = QuestionAttention(even_spacing=13.0, most_even=1.0).choose(scene)
    even = evenly_spaced(scene, 5)
    by_mass = set(chosen.tolist()) - set(even.tolist())
    assert set(even.tolist()) <= set(chosen.tolist())
    assert len(by_mass) == 15


def test_spacing_alone_asks_nothing():
    scene = Scene(20)
    assert torch.equal(QuestionAttention(even_spacing=1.0, most_even=1.0).choose(scene), evenly_spaced(scene, 20))
    assert scene.asked == []


def test_the_second_round_scores_what_the_first_repaired():
    scene = Scene(20)
    chosen = TwoRounds().choose(scene)
    assert scene.asked[0] is None
    assert len(scene.asked[1]) == 10
    assert set(scene.asked[1]) <= set(chosen.tolist())
    rest = [position for position in chosen.tolist() if position not in scene.asked[1]]
    others = [position for position in range(15, 65) if position not in chosen.tolist()]
    assert min(scene.mass.flip(0)[rest]) >= max(scene.mass.flip(0)[others])


def test_the_first_tokens_are_shared_equally_and_short_chunks_leave_theirs_to_the_others():
    assert FirstTokens().choose(Scene(6)).tolist() == [15, 16, 17, 35, 36, 37]
    assert FirstTokens().choose(Scene(45)).tolist() == [*range(15, 35), *range(35, 60)]
    assert FirstTokens(2).choose(Scene(0)).tolist() == [15, 16, 35, 36]


def test_random_tokens_are_the_same_again_and_others_for_another_seed():
    scene = Scene(20)
    assert torch.equal(RandomTokens().choose(scene), RandomTokens().choose(scene))
    assert not torch.equal(RandomTokens().choose(scene), RandomTokens(1).choose(scene))


def test_everything_and_nothing():
    assert Everything().choose(Scene(3)).tolist() == list(range(5, 65))
    assert NoTokens().choose(Scene(3)).tolist() == []
    assert NoTokens().narrow(Scene(3), 1, torch.arange(3), Measured()) is None


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (DeviationOf.KEYS, [20, 21]),
        (DeviationOf.VALUES, [40, 41]),
        (DeviationOf.BOTH, [21, 41]),
    ],
)
def test_the_largest_deviations_at_the_check_layer_stay(of, expected):
    scene = Scene(2)
    selector = DeviationAtOneLayer(of)
    chosen = selector.choose(scene)
    keys, values = torch.full((60,), 0.1), torch.full((60,), 0.1)
    keys[[15, 16]] = torch.tensor([8.0, 9.0])  # positions 20, 21
    values[[35, 36]] = torch.tensor([8.0, 9.0])
    keys[:10] = values[:10] = 100.0  # the exact chunk
    assert selector.narrow(scene, 0, chosen, Measured()) is None
    kept = selector.narrow(scene, 1, chosen, Measured(Deviation(keys, values)))
    assert chosen[kept].tolist() == expected


@pytest.mark.parametrize("num_layers", [3, 12, 32])
def test_filtering_narrows_layer_by_layer_and_spends_the_budget_on_average(num_layers):
    scene = Scene(200, sizes=(10, 1000, 1000))
    selector = GradualFiltering(num_layers)
    chosen, computed = selector.choose(scene), []
    for layer in range(num_layers):
        scores = torch.rand(len(chosen), generator=torch.Generator().manual_seed(layer))
        kept = selector.narrow(scene, layer, chosen, Measured(Deviation(scores, scores)))
        if kept is not None:
            chosen = chosen[kept]
            computed.append(len(chosen))
        elif layer:
            computed.append(len(chosen))
    assert computed == sorted(computed, reverse=True)
    assert computed[0] == 300
    assert math.isclose(sum(computed) / len(computed), 200, abs_tol=2)


def test_the_highest_scores_may_be_negative():
    scores = -torch.arange(69.0)
    assert highest(Scene(3), scores, 3).tolist() == [15, 16, 17]


def _covering(share, least=0.0, most=1.0, **scene):
    return Scene(None, coverage=Coverage(share, least, most), **scene)


@pytest.mark.parametrize("name", ["question", "two rounds"])
@pytest.mark.parametrize("count", [4, 9, 20, 50])
def test_bounds_that_meet_choose_what_a_fixed_budget_does(name, count):
    auto, fixed = _covering(0.7, count / 60, count / 60), Scene(count)
    assert ALL[name].choose(auto).tolist() == ALL[name].choose(fixed).tolist()


@pytest.mark.parametrize("name", ["question", "two rounds"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_what_covers_is_what_a_fixed_budget_of_that_many_chooses(name, share):
    auto = _covering(share)
    chosen = ALL[name].choose(auto).tolist()
    assert 5 < len(chosen) < 50
    assert chosen == ALL[name].choose(Scene(len(chosen))).tolist()
    assert auto.asked.count(None) == 1  # one pass over the reused KV settles the number and chooses


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8, 0.95])  # of so many that evenly spaced ones are no fixed part
def test_the_chosen_cover_the_share_and_one_token_fewer_would_not(share):
    mass = torch.rand(5009, generator=torch.Generator().manual_seed(3)) ** 4
    sizes = (1000, 1500, 2500)
    chosen = QuestionAttention().choose(_covering(share, mass=mass, sizes=sizes))
    total = float(mass[1005:5005].double().sum())
    assert int(chosen.min()) >= 1005
    assert float(mass[chosen].double().sum()) >= share * total
    fewer = QuestionAttention().choose(Scene(len(chosen) - 1, mass=mass, sizes=sizes))
    assert float(mass[fewer].double().sum()) < share * total


def test_the_attention_to_an_exact_chunk_does_not_count():
    mass = torch.rand(69, generator=torch.Generator().manual_seed(5))
    counts = []
    for there in (0.0, 1.0, 100.0):
        mass[:15] = there  # the prefix and the exact chunk
        counts.append(len(QuestionAttention().choose(_covering(0.6, mass=mass))))
    assert counts[0] == counts[1] == counts[2] < 50
    assert len(QuestionAttention().choose(_covering(0.6, mass=mass, first_is_exact=False))) < counts[0]


def test_nothing_is_spent_where_every_chunk_is_exact():
    assert QuestionAttention().choose(_covering(0.7, 0.1, 0.3, sizes=(60,))).tolist() == []
    assert TwoRounds().choose(_covering(0.7, 0.1, 0.3, sizes=(60,))).tolist() == []


def test_only_selectors_that_ask_the_question_meet_a_coverage():
    for name in SelectorName:
        assert make_selector(name, 4).meets_coverage == (name in AUTO_SELECTORS)
        if name not in AUTO_SELECTORS:
            with pytest.raises(ConfigError, match=rf"question or two-rounds\), got '{name}': take one of these"):
                BlendConfig(ratio="auto", selector=name)
