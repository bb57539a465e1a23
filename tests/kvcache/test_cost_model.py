import random

import pytest

from ragkit.kvcache.cost_model import Cost, CostModel

PRIOR = Cost(3e-4, 1 / 1.5e9)


def test_a_sum_of_pieces_costs_every_piece_and_every_unit():
    assert Cost(0.5, 0.01).seconds(200, pieces=3) == pytest.approx(3.5)


def test_nothing_measured_is_the_prior():
    assert CostModel(PRIOR).cost == PRIOR


def test_one_measurement_does_not_outweigh_the_prior_and_three_do():
    model = CostModel(PRIOR)
    model.add(1e6, 5.0)  # a pass that compiled
    assert model.cost.seconds(1e6) == pytest.approx(PRIOR.seconds(1e6))
    for _ in range(3):
        model.add(1e6, 1e6 / 3e8)
    assert model.cost.seconds(1e6) == pytest.approx(1e6 / 3e8)


def test_latency_and_rate_are_told_apart_by_pieces_of_different_sizes():
    chance = random.Random(0)
    model = CostModel(Cost(1e-2, 1e-5))
    for _ in range(30):
        tokens = chance.choice([64, 128, 256, 300, 512])
        model.add(tokens, (0.02 + tokens * 1e-3) * chance.uniform(0.95, 1.05))
    assert model.cost.per_piece == pytest.approx(0.02, rel=0.3)
    assert model.cost.per_unit == pytest.approx(1e-3, rel=0.05)


def test_sums_of_pieces_teach_what_single_pieces_do():
    model = CostModel(Cost(1e-2, 1e-5))
    for count in (1, 4, 8, 2, 3, 8):
        size = 1000 * count
        model.add(count * size, count * (0.1 + size * 1e-4), pieces=count)
    assert model.cost.seconds(5000) == pytest.approx(0.6)
    assert model.cost.seconds(20_000, pieces=10) == pytest.approx(3.0)


def test_some_reads_from_the_page_cache_leave_the_rate_of_the_disk():
    model = CostModel(PRIOR)
    for number in range(40):
        model.add(1e7, 1e7 / (6e9 if number % 3 == 0 else 4e8))
    assert model.cost.seconds(1e7) == pytest.approx(1e7 / 4e8)


def test_a_lasting_change_is_followed_within_eight_measurements():
    model = CostModel(PRIOR)
    for rate in [1e8] * 40 + [1e9] * 8:
        model.add(1e7, 1e7 / rate)
    assert model.cost.seconds(1e7) == pytest.approx(0.01)


def test_neither_part_is_ever_below_zero():
    chance = random.Random(1)
    model = CostModel(PRIOR)
    for _ in range(60):
        model.add(chance.choice([0, 10, 1e3, 1e6]), chance.choice([0.0, 1e-4, 0.1, 10]), chance.randint(1, 5))
        assert model.cost.per_piece >= 0
        assert model.cost.per_unit >= 0
        assert model.cost.seconds(1e6) > 0
