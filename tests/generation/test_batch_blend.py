"""Blended requests in a batch: the same answers, chunks held once where rows are shared, fields and all."""

from __future__ import annotations

import random

import pytest

from ragkit.config import BatchConfig, BlendRows
from ragkit.errors import CacheCapacityError
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_request import BatchRequest
from ragkit.generation.batch_runner import BatchRunner
from ragkit.generation.blend_prefill import BlendOptions, BlendPrefill
from ragkit.generation.chunk_prefill import ChunkPrefill
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.engine import Engine
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.strategy import LaunchedPrefill
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.eviction import make_policy
from ragkit.kvcache.kv_key import KVRecipe
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.memory_tier import MemoryTier
from ragkit.kvcache.pool_tier import PoolTier
from ragkit.types import Prompt, Segment

PREFIX = Segment(tuple(range(10, 22)))
SAMPLING = SamplingConfig(20, ignore_stop_tokens=True)


def prompt(*chunks: int, question: int) -> Prompt:
    made = [Segment(tuple(random.Random(one).choices(range(3, 300), k=40)), f"chunk-{one}") for one in chunks]
    return Prompt((PREFIX, *made, Segment((41, 42, 50 + question))))


def blend_of(engine: Engine, rows: BlendRows) -> BlendPrefill:
    decoder = engine.decoder
    codec = make_codec("fp32", decoder.layout)
    recipe = KVRecipe("0" * 64, decoder.config, "tiny", decoder.dtype, codec.codec_id)
    chunks = ChunkPrefill(decoder, engine.rotary, recipe, PREFIX.token_ids)
    tier = PoolTier(engine.pool, 20, make_policy("lru"))
    store = KVStore(codec, MemoryTier("ram", 1 << 30, make_policy("lru")), pool=tier)
    return BlendPrefill(store, chunks, BlendOptions(0.3, rows=rows))


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("rows", BlendRows)
def test_blended_answers_are_those_of_single_requests(tiny_folder, rows, is_paged):
    engine = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 80)
    if is_paged:
        engine._runner = DecodeRunner(engine.decoder, engine.pool)
    blend = blend_of(engine, rows)
    prompts = [prompt(0, 1 + index % 2, 3 + index % 3, question=index) for index in range(6)]
    made = [
        BatchRequest(str(index), one, SAMPLING, blend if index % 3 else "full", 0.3 if index % 3 else None)
        for index, one in enumerate(prompts)
    ]
    expected = [list(engine.generate(one.prompt, SAMPLING, one.strategy, one.ratio))[-1] for one in made]
    batch = BatchEngine(engine, BatchConfig(200))
    results = {one.request_id: one for one in batch.run(made)}
    for index, alone in enumerate(expected):
        finished = results[str(index)].finished
        assert results[str(index)].error is None
        assert finished.token_ids == alone.token_ids
        assert finished.warnings == alone.warnings == ()
        if index % 3:
            assert finished.usage == alone.usage
            assert finished.kv.hits == 3
    stats = batch.stats
    assert stats.prefill_tokens_computed == stats.prefill_tokens_needed
    assert stats.prefill_tokens_reused > 0
    # The two requests with full prefill share their beginning in any case.
    assert (1.2 * stats.kv_bytes_peak < stats.kv_bytes_listed_peak) == (rows is BlendRows.SHARED)
    blend.kv_store.close()


def test_the_pass_of_a_step_is_launched_before_what_a_strategy_prefills_in_it(tiny_folder, monkeypatch):
    engine = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 80)
    blend, done = blend_of(engine, BlendRows.PRIVATE), []
    step, launch = BatchRunner.step, BlendPrefill.launch

    def stepped(self, decodes, token_ids, pieces):
        done.append(f"a pass of {len(decodes)}")
        return step(self, decodes, token_ids, pieces)

    def launched(self, decoder, request):
        done.append("a blend")
        return launch(self, decoder, request)

    monkeypatch.setattr(BatchRunner, "step", stepped)
    monkeypatch.setattr(BlendPrefill, "launch", launched)
    made = [BatchRequest(str(index), prompt(0, 1, question=index), SAMPLING, blend, 0.3) for index in range(3)]
    assert all(one.error is None for one in BatchEngine(engine, BatchConfig(100)).run(made))
    # A GPU is at work while the host makes the launches of a blend; its first one finds nobody who decodes.
    assert done[:5] == ["a blend", "a pass of 1", "a blend", "a pass of 2", "a blend"]
    blend.kv_store.close()


@pytest.mark.parametrize("rows", BlendRows)
def test_the_blends_of_a_step_are_all_launched_before_any_is_waited_for(tiny_folder, rows, monkeypatch):
    engine = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 80)
    blend, done = blend_of(engine, rows), []
    launch = BlendPrefill.launch

    def launched(self, decoder, request):
        made = launch(self, decoder, request)
        done.append("launched")

        def finish():
            done.append("finished")
            return made.finish()

        return LaunchedPrefill(made.logits, finish)

    monkeypatch.setattr(BlendPrefill, "launch", launched)
    made = [BatchRequest(str(index), prompt(0, 1, question=index), SAMPLING, blend, 0.3) for index in range(3)]
    assert all(one.error is None for one in BatchEngine(engine, BatchConfig(400)).run(made))
    assert done == ["launched"] * 3 + ["finished"] * 3
    blend.kv_store.close()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_what_a_launched_blend_holds_is_let_go_where_the_step_fails(tiny_folder, monkeypatch):
    engine = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 80)
    blend = blend_of(engine, BlendRows.PRIVATE)
    done, launch, count = [], BlendPrefill.launch, iter(range(9))

    def launched(self, decoder, request):
        if next(count) == 2:
            raise KeyboardInterrupt
        made = launch(self, decoder, request)
        return LaunchedPrefill(made.logits, lambda: done.append(made.finish()))

    monkeypatch.setattr(BlendPrefill, "launch", launched)
    made = [BatchRequest(str(index), prompt(0, 1, question=index), SAMPLING, blend, 0.3) for index in range(3)]
    with pytest.raises(KeyboardInterrupt):
        list(BatchEngine(engine, BatchConfig(400)).run(made))
    assert len(done) == 2
    blend.kv_store.close()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_blend_that_finds_no_room_for_its_answer_is_let_go_and_waits_again(tiny_folder, monkeypatch):
    engine = Engine.load(tiny_folder, device="cpu", dtype="float32", kv_tokens=64 * 80)
    blend = blend_of(engine, BlendRows.PRIVATE)
    finished, adopt, launch, failing = [], BatchRunner.adopt, BlendPrefill.launch, [True]

    def launched(self, decoder, request):
        made = launch(self, decoder, request)

        def finish():
            finished.append(made)
            return made.finish()

        return LaunchedPrefill(made.logits, finish)

    def adopted(self, kv, capacity):
        if failing:
            failing.clear()
            raise CacheCapacityError("somebody else was first")
        return adopt(self, kv, capacity)

    monkeypatch.setattr(BlendPrefill, "launch", launched)
    monkeypatch.setattr(BatchRunner, "adopt", adopted)
    made = [BatchRequest(str(index), prompt(0, 1, question=index), SAMPLING, blend, 0.3) for index in range(2)]
    expected = [list(engine.generate(one.prompt, SAMPLING, blend, 0.3))[-1].token_ids for one in made]
    finished.clear()
    results = {one.request_id: one for one in BatchEngine(engine, BatchConfig(400)).run(made)}
    assert [results[str(index)].finished.token_ids for index in range(2)] == expected
    assert len(finished) == 3  # the first one twice
    blend.kv_store.close()
