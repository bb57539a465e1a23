"""Timing of prefills over a tiny model; only what does not depend on the machine is asserted."""

from __future__ import annotations

import math

import pytest

from ragkit.bench.blend_prompts import random_prompt
from ragkit.bench.blend_speed import BlendSpeed, KVPlace, PromptTimings, Side
from ragkit.bench.watch import Watch
from ragkit.config import BlendConfig, CodecName, KVConfig
from ragkit.progress import Silent

FULL, FROM_MEMORY, COMPUTED = Side(), Side(KVPlace.MEMORY, 0.15), Side(KVPlace.COMPUTED, 0.15)


@pytest.fixture(scope="module")
def prompt(engine):
    return random_prompt(engine.prompt_builder(), 259, 600, 64)


@pytest.fixture
def speed(engine, prompt):
    builder = engine.prompt_builder()
    kv, blend = KVConfig(codec=CodecName.FP32), BlendConfig(ratio=0.15)
    made = BlendSpeed(
        engine.decoder, engine.rotary, builder.prefix.token_ids, kv, blend, (0.05, 0.15), [prompt], with_pool=True
    )
    yield made
    made.close()


def test_every_place_and_ratio_is_timed_as_often_as_asked(speed, prompt):
    assert speed.measure(prompt, "random", 2, Watch(Silent()))
    rows = speed.rows()
    assert [(row.prefill, row.kv_from, row.ratio) for row in rows] == [
        ("full", None, None),
        ("blend", "memory", 0.05),
        ("blend", "memory", 0.15),
        ("blend", "gpu", 0.05),
        ("blend", "gpu", 0.15),
        ("blend", "computed", 0.15),
    ]
    assert {len(row.samples_ms) for row in rows} == {2}
    assert {row.tokens for row in rows} == {600}


def test_kv_is_computed_only_where_the_row_says_so(speed, prompt):
    speed.measure(prompt, "random", 1, Watch(Silent()))
    computing = {row.kv_from: row.compute_ms for row in speed.rows() if row.prefill == "blend"}
    assert computing["memory"] == computing["gpu"] == 0
    assert computing["computed"] > 0


def test_recomputing_everything_gives_full_prefills_logits(speed, prompt):
    check = speed.check(prompt, Watch(Silent()))
    assert check.tokens == 600
    assert check.gap < 1e-4
    assert check.noise < 1e-4


def test_after_the_time_limit_one_counted_round_is_finished(speed, prompt):
    assert not speed.measure(prompt, "random", 5, Watch(Silent(), seconds=0.0))
    assert {len(row.samples_ms) for row in speed.rows()} == {1}


def test_a_row_is_the_median_and_says_how_many_times_sooner_it_is():
    timings = PromptTimings(100, "random", [FULL, FROM_MEMORY, COMPUTED])
    for total in (900.0, 300.0, 310.0):
        timings.add(FULL, {"total": total})
        timings.add(FROM_MEMORY, {"total": total / 5, "load_kv": total / 100, "select": 1.0})
    full, blend = timings.rows()  # what has no sample yet has no row
    assert (full.first_logits_ms, full.times_full, full.load_ms) == (310.0, 1.0, None)
    assert (blend.first_logits_ms, blend.load_ms, blend.select_ms) == (62.0, 3.1, 1.0)
    assert blend.times_full == pytest.approx(5)


def test_without_a_sample_of_full_prefill_there_are_no_rows():
    timings = PromptTimings(100, "random", [FULL, FROM_MEMORY])
    timings.add(FROM_MEMORY, {"total": 1.0})
    assert timings.rows() == []


def test_a_part_of_a_watch_gets_a_share_of_what_is_left():
    now = [0.0]
    watch = Watch(Silent(), 10.0, lambda: now[0])
    now[0] = 4.0
    part = watch.part(0.5)
    now[0] = 6.9
    assert not part.is_over
    now[0] = 7.0
    assert part.is_over
    assert not watch.is_over
    assert not Watch(Silent(), math.inf).part(0.5).is_over
