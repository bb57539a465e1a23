"""Batches on a tiny model: every answer is the one that `Engine.generate` gives alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from ragkit.config import BatchConfig, BatchOrder, ChunkPlacement
from ragkit.errors import CacheCapacityError, GenerationError
from ragkit.generation import batch_engine
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_request import BatchRequest
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import Finished
from ragkit.types import Prompt, Segment

FORCED = SamplingConfig(max_new_tokens=12, ignore_stop_tokens=True)
PREFIX = Segment(tuple(range(10, 40)))


@pytest.fixture(scope="module")
def engine(tiny_folder) -> Engine:
    """The tiny model with a pool for many requests."""
    return Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 100)


def chunk(index: int) -> Segment:
    return Segment(tuple(random.Random(index).choices(range(3, 300), k=20 + index % 7)), f"chunk-{index}")


def prompt(*chunks: int, question: int = 0) -> Prompt:
    return Prompt((PREFIX, *(chunk(one) for one in chunks), Segment((41, 42, 50 + question))))


def requests(count: int = 12) -> list[BatchRequest]:
    """Requests over common chunks with answers of several lengths, some sampled."""
    made = []
    for index in range(count):
        sampling = SamplingConfig(4 + index % 9, float(index % 2), 0.9, seed=index, ignore_stop_tokens=index % 3 > 0)
        chunks = (index % 2, index % 3, 5 + index % 4)[: 1 + index % 3]
        made.append(BatchRequest(f"r{index}", prompt(*chunks, question=index), sampling))
    return made


def alone(engine: Engine, request: BatchRequest) -> Finished:
    finished = list(engine.generate(request.prompt, request.sampling, request.strategy, request.ratio))[-1]
    assert isinstance(finished, Finished)
    return finished


def check(engine: Engine, batch: BatchEngine, made: list[BatchRequest]) -> None:
    """Run a batch and compare each of its answers."""
    free = engine.pool.num_free
    results = {result.request_id: result for result in batch.run(made)}
    assert engine.pool.num_free == free
    assert len(results) == len(made) == batch.stats.requests
    for request in made:
        expected, result = alone(engine, request), results[request.request_id]
        assert result.error is None
        assert result.finished is not None
        assert result.finished.token_ids == expected.token_ids
        assert result.finished.reason is expected.reason
        assert result.text == engine.tokenizer.decode(expected.token_ids)
        assert result.finished.usage.prompt == expected.usage.prompt
        assert result.finished.usage.generated == expected.usage.generated


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("order", BatchOrder)
@pytest.mark.parametrize("budget", [7, 64, 4096])
def test_answers_are_those_of_single_requests(engine, sharing, order, budget):
    check(engine, BatchEngine(engine, BatchConfig(budget, sharing=sharing, order=order)), requests())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_answers_of_other_families_are_those_of_single_requests(tmp_path, family):
    from .conftest import hf_model, write_tokenizer

    hf_model(family).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    own = Engine.load(tmp_path, device="cpu", dtype="float32", kv_tokens=64 * 100)
    check(own, BatchEngine(own, BatchConfig(50)), requests(6))


def test_answers_over_block_tables_are_those_of_single_requests(tiny_folder):
    paged = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 30)
    paged._runner = DecodeRunner(paged.decoder, paged.pool)
    batch = BatchEngine(paged, BatchConfig(64))
    check(paged, batch, [*requests(), BatchRequest("strategy", prompt(1, 2), FORCED, Strategy())])
    assert batch.stats.mixed_steps > 0
    assert batch.stats.steps > batch.stats.mixed_steps


def test_prefill_computes_each_distinct_beginning_once(engine, monkeypatch):
    monkeypatch.setattr("ragkit.generation.prefix_groups.LEAST_SHARED_TOKENS", 1)
    made = requests()
    batch = BatchEngine(engine, BatchConfig(64))
    check(engine, batch, made)
    ids = [request.prompt.token_ids for request in made]
    stats = batch.stats
    assert stats.preemptions == stats.prefill_tokens_repeated == 0
    assert stats.prompt_tokens == sum(len(one) for one in ids)
    assert stats.prefill_tokens_computed == stats.prefill_tokens_needed
    assert stats.prefill_tokens_needed + stats.prefill_tokens_shared == stats.prompt_tokens
    unshared = BatchEngine(engine, BatchConfig(64, sharing=False))
    list(unshared.run(made))
    assert unshared.stats.prefill_tokens_computed == unshared.stats.prompt_tokens == stats.prompt_tokens
    distinct = {one[:stop] for one in ids for stop in range(1, len(one) + 1)}
    assert stats.prefill_tokens_computed <= 1.05 * len(distinct)


def test_a_common_beginning_is_held_once(engine):
    made = [BatchRequest(str(index), prompt(0, 1, 2, 3, question=index), FORCED) for index in range(8)]
    batch = BatchEngine(engine, BatchConfig(4096))
    list(batch.run(made))
    assert batch.stats.kv_bytes_listed_peak > 1.4 * batch.stats.kv_bytes_peak


def test_common_chunks_come_first_where_their_order_is_free(engine):
    made = [BatchRequest(str(index), prompt(10 + index, 0, question=index), FORCED) for index in range(6)]
    kept, free = (BatchEngine(engine, BatchConfig(chunk_order=order)) for order in ChunkPlacement)
    list(kept.run(made))
    texts = {result.request_id: result.text for result in free.run(made)}
    assert kept.stats.prefill_tokens_computed - free.stats.prefill_tokens_computed == 5 * len(chunk(0).token_ids)
    moved = dataclasses.replace(made[2], prompt=prompt(0, 12, question=2))
    assert texts["2"] == engine.tokenizer.decode(alone(engine, moved).token_ids)


@pytest.mark.parametrize("sharing", [True, False])
def test_a_pool_too_small_for_all_changes_no_answer(tiny_folder, sharing):
    small = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 7)
    made = [
        BatchRequest(str(index), prompt(index % 3, question=index), SamplingConfig(90, ignore_stop_tokens=True))
        for index in range(7)
    ]
    batch = BatchEngine(small, BatchConfig(64, sharing=sharing))
    check(small, batch, made)
    assert batch.stats.preemptions > 0
    assert batch.stats.prefill_tokens_repeated > 0
    stats = batch.stats
    assert stats.prefill_tokens_computed == stats.prefill_tokens_needed + stats.prefill_tokens_repeated


def test_a_sampled_answer_goes_on_with_its_own_random_numbers_after_preemption(tiny_folder):
    small = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 5)
    made = [
        BatchRequest(str(index), prompt(index), SamplingConfig(80, 1.0, seed=index, ignore_stop_tokens=True))
        for index in range(4)
    ]
    batch = BatchEngine(small, BatchConfig(64))
    check(small, batch, made)
    assert batch.stats.preemptions > 0


def test_what_is_wrong_with_a_request_is_its_own_result(tiny_folder):
    small = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 3)
    made = requests(4)
    bad = [
        BatchRequest("empty", Prompt(())),
        BatchRequest("unknown strategy", prompt(1), strategy="warp"),
        BatchRequest("unknown token", Prompt((Segment((5, 900)),))),
        BatchRequest("too large", prompt(1, 2, 3, 4), SamplingConfig(100)),
    ]
    results = {one.request_id: one for one in BatchEngine(small).run([*bad[:2], *made, *bad[2:]])}
    assert len(results) == 8
    assert {one.request_id for one in results.values() if one.error} == {one.request_id for one in bad}
    assert isinstance(results["too large"].error, CacheCapacityError)
    assert all(isinstance(results[one.request_id].error, GenerationError) for one in bad[:3])
    for one in bad:
        assert "\n" not in str(results[one.request_id].error)
        assert (results[one.request_id].text, results[one.request_id].finished) == ("", None)


class Strategy:
    """Prefills in one go; the first calls fail."""

    name = "failing"

    def __init__(self, fails: int = 0, error: Exception | None = None) -> None:
        self.fails, self.error, self.calls = fails, error, 0

    def prefill(self, decoder, request):
        self.calls += 1
        if self.calls <= self.fails:
            request.kv.reserve(3)
            raise self.error or CacheCapacityError("no room at the moment")
        return FullPrefill().prefill(decoder, request)


def test_requests_with_a_strategy_of_their_own_are_answered_in_the_same_batch(engine):
    made = requests()
    mixed = [dataclasses.replace(one, strategy=Strategy()) if index % 2 else one for index, one in enumerate(made)]
    batch = BatchEngine(engine, BatchConfig(100))
    check(engine, batch, mixed)
    stats = batch.stats
    assert stats.prefill_tokens_computed == stats.prefill_tokens_needed


def test_a_preempted_request_with_a_strategy_keeps_its_answer(tiny_folder):
    small = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 10)
    made = [
        BatchRequest(str(index), prompt(index), SamplingConfig(150, ignore_stop_tokens=True), Strategy())
        for index in range(5)
    ]
    batch = BatchEngine(small, BatchConfig(200))
    check(small, batch, made)
    assert batch.stats.preemptions > 0


def test_a_strategy_that_fails_fails_its_request_alone(engine):
    made = requests(3)
    failing = BatchRequest("bad", prompt(1), FORCED, Strategy(1, GenerationError("no")))
    results = {one.request_id: one for one in BatchEngine(engine).run([failing, *made])}
    assert str(results["bad"].error) == "no"
    assert all(results[one.request_id].error is None for one in made)


def test_a_strategy_that_ends_the_run_leaves_no_rows_behind(engine):
    free = engine.pool.num_free
    with pytest.raises(KeyboardInterrupt):
        list(BatchEngine(engine).run([BatchRequest("bad", prompt(1), FORCED, Strategy(1, KeyboardInterrupt()))]))
    assert engine.pool.num_free == free


def test_a_strategy_that_finds_no_room_is_tried_again(engine):
    strategy = Strategy(2)
    made = [*requests(3), BatchRequest("late", prompt(1), FORCED, strategy)]
    results = {one.request_id: one for one in BatchEngine(engine).run(made)}
    assert results["late"].error is None
    assert strategy.calls == 3


@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_pool_that_others_take_blocks_from_changes_no_answer(tiny_folder, monkeypatch, every):
    own = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 100)
    allocate, calls = own.pool.allocate, []

    def taken(count, **options):
        calls.append(count)
        if len(calls) % every == 0 and len(calls) < 40:
            raise CacheCapacityError("somebody else was quicker")
        return allocate(count, **options)

    monkeypatch.setattr(own.pool, "allocate", taken)
    made = requests()
    results = {result.request_id: result for result in BatchEngine(own, BatchConfig(64)).run(made)}
    monkeypatch.undo()
    assert len(calls) > 10
    for request in made:
        assert results[request.request_id].finished.token_ids == alone(own, request).token_ids
    assert own.pool.num_free == own.pool.num_blocks


def test_a_pool_that_others_keep_fails_requests_but_not_the_run(tiny_folder, monkeypatch):
    own = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 100)

    def taken(count, **options):
        raise CacheCapacityError("somebody else was quicker")

    monkeypatch.setattr(own.pool, "allocate", taken)
    results = list(BatchEngine(own, BatchConfig(64)).run(requests(5)))
    assert len(results) == 5
    assert all(isinstance(result.error, CacheCapacityError) for result in results)


def test_closing_the_run_gives_everything_back(engine):
    free = engine.pool.num_free
    results = BatchEngine(engine, BatchConfig(40)).run(requests())
    next(results)
    assert engine.pool.num_free < free
    results.close()
    assert engine.pool.num_free == free


def test_requests_behind_a_window_of_wrong_ones_are_answered(engine):
    wrong = [BatchRequest(f"wrong{index}", Prompt(())) for index in range(7)]
    results = list(
        BatchEngine(engine, BatchConfig(look_ahead=3)).run([*wrong, BatchRequest("right", prompt(1), FORCED)])
    )
    assert [one.request_id for one in results if one.error is None] == ["right"]
    assert len(results) == 8


def test_memory_does_not_grow_with_the_common_beginnings_of_a_long_job(engine):
    runs, made = [], [BatchRequest(str(one), prompt(one // 4, question=one), FORCED) for one in range(48)]
    create = batch_engine.BatchRun
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_engine, "BatchRun", lambda *given: runs.append(create(*given)) or runs[0])
        most = 0
        for _ in BatchEngine(engine, BatchConfig(look_ahead=8, max_running=4)).run(made):
            most = max(most, len(runs[0]._shared), len(runs[0]._begun) - len(runs[0]._jobs))
    assert most <= 16  # of two windows; the job has 13 beginnings that differ, some of them in every window


def test_requests_are_pulled_no_further_ahead_than_configured(engine):
    pulled = []

    def source():
        for request in requests(10):
            pulled.append(request.request_id)
            yield request

    results = BatchEngine(engine, BatchConfig(look_ahead=3, max_running=2)).run(source())
    next(results)
    assert len(pulled) <= 6
    assert len(list(results)) == 9


def test_results_come_before_the_last_request_is_pulled(engine):
    asked = iter(requests(6))
    results = BatchEngine(engine, BatchConfig(look_ahead=1, max_running=1)).run(asked)
    next(results)
    assert next(asked).request_id != "r5"


@torch.inference_mode()
def test_steps_compute_no_padding(engine, monkeypatch):
    seen = []
    embed = type(engine.decoder).embed
    monkeypatch.setattr(type(engine.decoder), "embed", lambda own, ids: seen.append(len(ids)) or embed(own, ids))
    batch = BatchEngine(engine, BatchConfig(64))
    list(batch.run(requests()))
    assert sum(seen) == batch.stats.prefill_tokens_computed + batch.stats.decode_tokens
    assert max(seen) <= 64
