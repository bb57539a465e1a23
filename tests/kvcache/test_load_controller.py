import itertools
import random

import pytest
from kv_samples import ref_of

from ragkit.kvcache.cost_model import Cost
from ragkit.kvcache.load_controller import COMPUTING, LoadController, StoredChunk

TOKENS = 512
BF16, INT4 = 131072 * TOKENS, 36864 * TOKENS  # bytes of a chunk at the shape of Llama 3 8B
GPU = Cost(0.0, 14e9 / 3e14)  # 24 ms a chunk


def chunks(count, nbytes, tier="disk", tokens=TOKENS, is_cached=False):
    return [StoredChunk(ref_of((tier, number), tokens), tier, nbytes, is_cached) for number in range(count)]


def taught(per_token_s=1e-3, **rates):
    """A controller that has measured these bytes/s and seconds a token."""
    controller = LoadController(Cost(0.0, per_token_s))
    for _ in range(8):
        controller.computed(TOKENS, TOKENS * per_token_s)
    for tier, rate in rates.items():
        for (chunk,) in [chunks(1, 10**6, tier)] * 80:
            teach(controller, chunk, rate)
    return controller


def teach(controller, chunk, rate, clock=itertools.count(1000, 1000)):  # noqa: B008 - one clock on purpose
    start = next(clock)
    controller.loaded(chunk, start, start + chunk.nbytes / rate)


def test_from_an_ordinary_disk_part_of_raw_kv_and_little_of_int4_is_computed():
    controller = LoadController(GPU)
    raw, low = controller.plan(chunks(64, BF16)), controller.plan(chunks(64, INT4))
    # 45 ms a load and 24 ms a pass: loading and computing end together at a third loaded.
    assert len(raw.load) == pytest.approx(64 * 24 / (24 + 45), abs=1)
    assert raw.expected_s == pytest.approx(64 / (1 / 0.045 + 1 / 0.0239), rel=0.03)
    assert len(low.load) == pytest.approx(64 * 24 / (24 + 12.9), abs=1)
    assert low.expected_s == pytest.approx(64 / (1 / 0.0129 + 1 / 0.0239), rel=0.03)


def test_every_stored_chunk_is_in_the_plan_once():
    stored = chunks(9, BF16)
    plan = LoadController(GPU).plan(stored)
    assert sorted(chunk.ref.key for chunk in plan.load + plan.compute) == sorted(chunk.ref.key for chunk in stored)


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_is_within_one_chunk_of_the_best_of_all(seed):
    chance = random.Random(seed)
    controller = taught(1e-4, disk=chance.choice([1e8, 1e9]), s3=chance.choice([5e7, 5e8]))
    stored = [
        StoredChunk(ref_of(number, tokens), chance.choice(["disk", "s3"]), tokens * chance.choice([20_000, 130_000]))
        for number, tokens in enumerate(chance.choices(range(20, 600), k=9))
    ]
    must_s = chance.choice([0.0, 0.05])
    load_s = [controller.load_seconds([chunk]) for chunk in stored]
    compute_s = [controller.compute_seconds([len(chunk.ref.token_ids)]) for chunk in stored]
    best = min(
        max(
            sum(load for load, choice in zip(load_s, choices, strict=True) if choice),
            must_s + sum(compute for compute, choice in zip(compute_s, choices, strict=True) if not choice),
        )
        for choices in itertools.product([True, False], repeat=9)
    )
    plan = controller.plan(stored, [round(must_s / 1e-4)] if must_s else [])
    slack = max(min(load, compute) for load, compute in zip(load_s, compute_s, strict=True))
    assert best * (1 - 1e-9) <= plan.expected_s <= max(best + slack, best / 0.95)


def test_what_must_be_computed_leaves_more_to_load():
    controller = taught(1e-4, disk=1e9)
    stored = chunks(20, 40_000_000)
    assert len(controller.plan(stored, [512] * 10).load) > len(controller.plan(stored).load)


def test_a_small_gain_is_no_reason_to_compute():
    stored = chunks(4, 10**6)
    slow, as_quick = taught(1.0, disk=1e9), taught(1e-3 / TOKENS, disk=1e9)
    assert slow.plan(stored).compute == ()
    assert len(as_quick.plan(stored).compute) == 2
    # A pass beside the loads spares one load: 2.5% of forty, 10% of ten.
    assert taught(30e-3 / TOKENS, disk=1e9).plan(chunks(40, 10**6)).compute == ()
    assert len(taught(8e-3 / TOKENS, disk=1e9).plan(chunks(10, 10**6)).compute) == 1


def test_what_is_slowest_to_load_is_computed_first_and_what_is_quickest_loaded_first():
    controller = taught(1e-4, disk=1e9)
    stored = [StoredChunk(ref_of(size, TOKENS), "disk", size * 10**7) for size in (5, 1, 9, 3, 7)]
    plan = controller.plan(stored)
    assert [chunk.nbytes // 10**7 for chunk in plan.load] == [1, 3, 5]
    assert [chunk.nbytes // 10**7 for chunk in plan.compute] == [9, 7]


def test_rates_are_those_that_were_measured():
    controller = taught(2e-3, disk=3e8, s3=2e7)
    assert controller.load_seconds(chunks(2, 3 * 10**6)) == pytest.approx(0.02, rel=0.05)
    assert controller.load_seconds(chunks(1, 10**6, "s3")) == pytest.approx(0.05, rel=0.05)
    assert controller.compute_seconds([100, 200]) == pytest.approx(0.6, rel=0.05)
    assert set(controller.costs()) == {COMPUTING, "disk", "s3"}
    assert 1 / controller.costs()["disk"].per_unit == pytest.approx(3e8, rel=0.05)


def test_loads_beside_each_other_are_measured_together():
    controller = LoadController(GPU)
    for turn in range(20):
        for number, chunk in enumerate(chunks(4, 10**6)):
            # All four begin at once and end one after the other, as on one disk of 100 MB/s.
            controller.loaded(chunk, turn, turn + 0.01 * (number + 1))
    assert controller.load_seconds(chunks(4, 10**6)) == pytest.approx(0.04, rel=0.05)


def test_reads_from_the_page_cache_are_measured_apart():
    controller = LoadController(GPU)
    cached, cold = chunks(1, 10**7, is_cached=True)[0], chunks(1, 10**7)[0]
    for _ in range(10):
        teach(controller, cached, 6e9)
        teach(controller, cold, 2e8)
    assert controller.load_seconds([cached]) == pytest.approx(1e7 / 6e9, rel=0.1)
    assert controller.load_seconds([cold]) == pytest.approx(0.05, rel=0.1)
    assert controller.plan([cold, cached]).load[0] is cached


def test_a_place_that_is_passed_over_is_tried_again_with_one_chunk():
    controller = taught(1e-6, s3=1e5)  # 10 s against half a millisecond
    stored = chunks(5, 10**6, "s3")
    loads = [len(controller.plan(stored).load) for _ in range(48)]
    assert sum(loads) == 3
    assert max(loads) == 1


def test_a_place_that_became_fast_is_used_again():
    controller = taught(1e-5, s3=1e5)
    stored = chunks(10, 10**6, "s3")
    used = []
    for _ in range(120):
        plan = controller.plan(stored)
        for chunk in plan.load:
            teach(controller, chunk, 1e9)
        used.append(len(plan.load))
    assert used[:15] == [0] * 15
    assert used[-1] >= 5


def test_nothing_stored_is_an_empty_plan():
    plan = LoadController(GPU).plan([], [100])
    assert (plan.load, plan.compute) == ((), ())
