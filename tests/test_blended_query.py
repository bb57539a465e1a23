"""Questions answered from reused chunk KV: the same answers cold and warm, and a true account of what was reused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from blended_pipeline import CONFIG, QUESTIONS, ask_all, open_blended, reused, write_documents
from tiny_generator import write_generator

from ragkit import Pipeline
from ragkit.config import (
    BlendConfig,
    BlendRows,
    ChunkContextName,
    CodecName,
    LoadingMode,
    PolicyName,
    SelectorName,
    Strategy,
)
from ragkit.errors import ConfigError, StoreError, UsageError
from ragkit.generation.engine import Engine
from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.kv_segment import RecordReader
from ragkit.kvcache.load_controller import LoadController, LoadPlan
from ragkit.kvcache.remote_tier import RemoteTier

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def place(tmp_path: Path, engine: Engine) -> Path:
    """A store without any KV."""
    with open_blended(tmp_path / "store", engine) as pipeline:
        pipeline.ingest([write_documents(tmp_path / "docs")])
    return tmp_path / "store"


@pytest.fixture
def pipeline(place: Path, engine: Engine) -> Iterator[Pipeline]:
    with open_blended(place, engine) as pipeline:
        yield pipeline


def test_the_second_answer_reuses_what_the_first_computed_and_is_the_same(pipeline: Pipeline) -> None:
    cold, warm = pipeline.query(QUESTIONS[0]), pipeline.query(QUESTIONS[0])
    assert (reused(cold), reused(warm)) == ((0, 5), (5, 0))
    assert cold.text == warm.text
    assert cold.strategy == warm.strategy == "blend"


def test_another_process_finds_the_kv_on_disk(place: Path, engine: Engine) -> None:
    with open_blended(place, engine) as pipeline:
        cold = ask_all(pipeline)
    with open_blended(place, engine, memory_mb=0) as pipeline:
        answers = [pipeline.query(question) for question in QUESTIONS]
    assert [answer.text for answer in answers] == cold
    assert all(reused(answer) == (5, 0) and set(answer.kv.bytes_by_tier) == {"disk"} for answer in answers)


def test_different_questions_have_different_answers(pipeline: Pipeline) -> None:
    assert len(set(ask_all(pipeline))) == len(QUESTIONS)


def test_tokens_add_up_and_the_ratio_bounds_those_recomputed(pipeline: Pipeline) -> None:
    answer = pipeline.query(QUESTIONS[0], ratio=0.3)
    tokens = answer.tokens
    assert tokens.prompt == tokens.reused + tokens.recomputed
    assert 0.3 < tokens.recomputed / tokens.prompt < 0.65  # the ending is always computed
    assert pipeline.query(QUESTIONS[0], ratio=0.0).tokens.recomputed < tokens.recomputed


def test_a_ratio_of_1_gives_the_answer_of_full_prefill(pipeline: Pipeline) -> None:
    blended = [pipeline.query(question, ratio=1.0).text for question in QUESTIONS]
    full = [pipeline.query(question, strategy="full").text for question in QUESTIONS]
    assert blended == full
    assert blended != [pipeline.query(question, ratio=0.0).text for question in QUESTIONS]


def test_a_ratio_without_a_part_is_refused_or_told(place: Path, engine: Engine) -> None:
    automatic = replace(CONFIG, generation=replace(CONFIG.generation, strategy=Strategy.AUTO))
    automatic = replace(automatic, blend=replace(CONFIG.blend, min_tokens=100_000))
    with open_blended(place, engine, automatic) as pipeline:
        with pytest.raises(UsageError, match="the strategy is full: leave the ratio out"):
            pipeline.query(QUESTIONS[0], strategy="full", ratio=0.3)
        answer = pipeline.query(QUESTIONS[0], ratio=0.3)
        assert answer.warnings == ("the ratio 0.3 had no part: the strategy was full",)
        assert pipeline.query(QUESTIONS[0]).warnings == ()


def test_auto_decides_by_the_prompt_alone(place: Path, engine: Engine) -> None:
    automatic = replace(CONFIG, generation=replace(CONFIG.generation, strategy=Strategy.AUTO))
    with open_blended(place, engine, automatic) as pipeline:
        assert pipeline.query(QUESTIONS[0], k=1).strategy == "full"  # too few tokens of chunks
        cold, warm = pipeline.query(QUESTIONS[0]), pipeline.query(QUESTIONS[0])
        assert (cold.strategy, warm.strategy) == ("blend", "blend")
        assert pipeline.query(QUESTIONS[0], k=1).strategy == "full"  # also now that its KV is there
        assert pipeline.query(QUESTIONS[0], k=1, strategy="blend").strategy == "blend"


def test_full_prefill_reports_no_kv(pipeline: Pipeline) -> None:
    answer = pipeline.query(QUESTIONS[0], strategy="full")
    assert (answer.strategy, answer.kv.hits, answer.kv.misses, answer.tokens.reused) == ("full", 0, 0, 0)
    assert list(answer.timings_ms) == ["load_models", "retrieve", "load_kv", "prefill", "first_token", "total"]


def test_every_step_of_blending_is_timed_within_prefill(pipeline: Pipeline) -> None:
    cold, warm = (pipeline.query(QUESTIONS[0]).timings_ms for _ in range(2))
    steps = ("load_kv", "compute_kv", "select", "blend")
    assert list(cold) == ["load_models", "retrieve", *steps, "prefill", "first_token", "total"]
    for timings in (cold, warm):
        assert sum(timings[step] for step in steps) <= timings["prefill"] <= timings["first_token"] < timings["total"]
    assert cold["compute_kv"] > 0 == warm["compute_kv"]
    assert cold["load_models"] > 0 == warm["load_models"]


def test_another_system_prompt_uses_the_same_chunk_kv(pipeline: Pipeline) -> None:
    pipeline.query(QUESTIONS[0])
    answer = pipeline.query(QUESTIONS[0], system_prompt="Answer in one word, and be sure of it.")
    assert reused(answer) == (5, 0)
    assert answer.text != pipeline.query(QUESTIONS[0]).text


def test_kv_is_loaded_while_the_question_is_judged(place: Path, engine: Engine, monkeypatch) -> None:
    with open_blended(place, engine) as pipeline:
        cold = pipeline.query(QUESTIONS[0])
    with open_blended(place, engine) as pipeline:
        loaded = threading.Event()
        store = pipeline.parts.blending.kv_store

        def judge(question, hits, embedder, config):
            for _ in range(500):
                if store.stats.prefetched == len(hits):
                    loaded.set()
                    break
                threading.Event().wait(0.01)
            return original(question, hits, embedder, config)

        from ragkit.answers import confidence

        original = confidence.judge
        monkeypatch.setattr(confidence, "judge", judge)
        answer = pipeline.query(QUESTIONS[0])
    assert loaded.is_set()
    assert set(answer.kv.bytes_by_tier) == {"ram"}
    assert answer.text == cold.text


def test_chunks_that_are_computed_sooner_than_loaded_are_and_the_answer_says_so(
    place: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_blended(place, engine, loading=LoadingMode.AUTO) as pipeline:
        cold = pipeline.query(QUESTIONS[0])
        assert pipeline.query(QUESTIONS[0]).kv.recomputed == 0  # memory is always sooner
    monkeypatch.setattr(LoadController, "load_seconds", lambda controller, chunks: 100.0 * len(chunks))
    monkeypatch.setattr(LoadController, "plan", lambda controller, stored: LoadPlan((), tuple(stored), 1.0))
    with open_blended(place, engine, loading=LoadingMode.AUTO) as pipeline:
        warm = pipeline.query(QUESTIONS[0])
    assert (warm.kv.hits, warm.kv.misses, warm.kv.recomputed) == (0, 0, 5)
    assert (warm.text, warm.tokens) == (cold.text, cold.tokens)
    with open_blended(place, engine, loading=LoadingMode.ALWAYS) as pipeline:
        assert reused(pipeline.query(QUESTIONS[0])) == (5, 0)


def test_what_left_the_store_is_forgotten_after_an_error_in_looking(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.query(QUESTIONS[0])
    blending, store = pipeline.parts.blending, pipeline.store
    assert len(blending.kv_store.refs()) == 5

    def unreadable(chunk_ids: list[str]) -> set[str]:
        raise StoreError("the catalogue cannot be read")

    with monkeypatch.context() as damaged:
        damaged.setattr(store, "known_chunks", unreadable)
        with pytest.raises(StoreError):
            blending.follow(10**6)
    monkeypatch.setattr(store, "known_chunks", lambda chunk_ids: set())
    monkeypatch.setattr(store, "kv_entries", lambda keys: {})
    blending.follow(10**6)
    assert blending.kv_store.refs() == []


def test_two_pipelines_share_an_engine_and_not_their_stores(tmp_path: Path, place: Path, engine: Engine) -> None:
    with open_blended(place, engine) as first:
        first.query(QUESTIONS[0])
        with open_blended(tmp_path / "other", engine) as second:
            second.ingest([write_documents(tmp_path / "more", range(5, 8))])
            assert reused(second.query(QUESTIONS[0])) == (0, 5)
        assert reused(first.query(QUESTIONS[0])) == (5, 0)


def test_a_remote_place_that_cannot_be_opened_is_told_once_and_answers_go_on(
    place: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with open_blended(place, engine, disk_mb=0, remote="nowhere://x") as pipeline:
        answers = [pipeline.query(question).text for question in QUESTIONS]
    with open_blended(place, engine, disk_mb=0) as pipeline:
        assert answers == [pipeline.query(question).text for question in QUESTIONS]
    [warning] = [record.message for record in caplog.records if "nowhere://x" in record.message]
    assert "cannot be opened" in warning
    assert warning.endswith("this process goes on without it")


def test_kv_also_goes_to_a_remote_place(tmp_path: Path, place: Path, engine: Engine) -> None:
    url = (tmp_path / "remote").as_uri()
    with open_blended(place, engine, disk_mb=0, remote=url) as pipeline:
        cold = pipeline.query(QUESTIONS[0])
    with open_blended(place, engine, disk_mb=0, memory_mb=0, remote=url) as pipeline:
        warm = pipeline.query(QUESTIONS[0])
    assert (reused(warm), set(warm.kv.bytes_by_tier)) == ((5, 0), {"file"})
    assert warm.text == cold.text


def test_kv_of_a_remote_place_is_fetched_once_and_then_taken_from_the_disk(
    tmp_path: Path, place: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (tmp_path / "remote").as_uri()
    with open_blended(place, engine, disk_mb=0, remote=url) as pipeline:
        cold = pipeline.query(QUESTIONS[0])
    opened: list[str] = []
    open_tier = RemoteTier.open

    def counted(tier: RemoteTier, ref: ChunkRef, *arguments) -> AbstractContextManager[RecordReader]:
        opened.append(ref.chunk_id)
        return open_tier(tier, ref, *arguments)

    monkeypatch.setattr(RemoteTier, "open", counted)
    for reads in (5, 0):
        opened.clear()
        with open_blended(place, engine, remote=url) as pipeline:
            warm = pipeline.query(QUESTIONS[0])
        assert len(opened) == reads
        assert (reused(warm), warm.text, warm.warnings) == ((5, 0), cold.text, ())


@pytest.mark.parametrize("selector", SelectorName)
def test_every_selector_answers(place: Path, engine: Engine, selector: SelectorName) -> None:
    config = replace(CONFIG, blend=BlendConfig(selector=selector, ratio=0.3))
    with open_blended(place, engine, config) as pipeline:
        cold, warm = pipeline.query(QUESTIONS[0]), pipeline.query(QUESTIONS[0])
    assert cold.text == warm.text
    assert warm.kv.hits == 5


def test_rows_are_shared_where_the_pool_has_room_and_an_answer_says_where_it_has_none(
    place: Path, engine: Engine
) -> None:
    blend = replace(CONFIG.blend, ratio=1.0, selector=SelectorName.EVERYTHING)
    with open_blended(place, engine, replace(CONFIG, blend=blend)) as pipeline:
        expected = ask_all(pipeline)
    config = replace(CONFIG, blend=replace(blend, rows=BlendRows.SHARED))
    roomy = Engine.load(engine.folder, device="cpu", dtype="float32", kv_tokens=8192)
    with open_blended(place, roomy, config) as pipeline:
        assert ask_all(pipeline) == expected
        again = pipeline.query(QUESTIONS[0])
        assert set(again.kv.bytes_by_tier) == {"pool"}
        assert again.warnings == ()
        free = roomy.pool.num_free
        assert free < roomy.pool.num_blocks
        pipeline.query(QUESTIONS[1])
        assert roomy.pool.num_free == free  # the chunks stay, the request's own rows do not
    with open_blended(place, roomy, config, gpu_mb=0) as pipeline:
        answer = pipeline.query(QUESTIONS[0])
        assert "rows are private, not shared: there is no tier in the pool" in answer.warnings[0]
        assert ask_all(pipeline) == expected


@pytest.mark.parametrize("context", ChunkContextName)
@pytest.mark.parametrize("codec", [CodecName.BF16, CodecName.INT8, CodecName.INT4, CodecName.ENTROPY2])
def test_kv_of_every_codec_and_context_gives_cold_and_warm_the_same_answer(
    place: Path, engine: Engine, codec: CodecName, context: ChunkContextName
) -> None:
    with open_blended(place, engine, codec=codec, context=context) as pipeline:
        cold = ask_all(pipeline)
    with open_blended(place, engine, codec=codec, context=context, policy=PolicyName.LRU) as pipeline:
        assert ask_all(pipeline) == cold
        assert pipeline.query(QUESTIONS[0]).kv.misses == 0
    with open_blended(place, engine) as pipeline:  # KV of another codec is a miss
        assert reused(pipeline.query(QUESTIONS[0])) == (0, 5)


def test_with_auto_each_question_finds_its_ratio_within_the_bounds(place: Path, engine: Engine) -> None:
    blend = replace(CONFIG.blend, ratio="auto", auto_least=0.1, auto_most=0.6)
    counts = []
    for coverage in (0.0, 0.5, 1.0):
        config = replace(CONFIG, blend=replace(blend, auto_coverage=coverage))
        with open_blended(place, engine, config) as pipeline:
            counts.append(pipeline.query(QUESTIONS[0]).tokens.recomputed)
            least, most = (pipeline.query(QUESTIONS[0], ratio=bound).tokens.recomputed for bound in (0.1, 0.6))
    assert least == counts[0] < counts[1] < counts[2] == most


def test_auto_may_be_asked_of_one_question_where_the_selector_can(place: Path, engine: Engine) -> None:
    with open_blended(place, engine, CONFIG) as pipeline:
        least, most = (pipeline.query(QUESTIONS[0], ratio=bound).tokens.recomputed for bound in (0.05, 0.3))
        assert least <= pipeline.query(QUESTIONS[0], ratio="auto").tokens.recomputed <= most
    with (
        open_blended(place, engine, replace(CONFIG, blend=BlendConfig(selector=SelectorName.FIRST))) as pipeline,
        pytest.raises(ConfigError, match=r"blend\.ratio can be auto where .* got 'first'"),
    ):
        pipeline.query(QUESTIONS[0], ratio="auto")


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), "half"])
def test_an_impossible_ratio_is_named(pipeline: Pipeline, ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"blend\.ratio must lie in \[0, 1\]"):
        pipeline.query(QUESTIONS[0], ratio=ratio)


def test_an_unknown_strategy_names_those_that_are_there(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match="'fast'; take one of auto, full, blend"):
        pipeline.query(QUESTIONS[0], strategy="fast")


def test_weights_that_were_replaced_after_loading_leave_no_kv_on_disk(
    tmp_path: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_generator(tmp_path / "model")
    stale = Engine.load(folder, device="cpu", dtype="float32")
    write_generator(folder, seed=1)
    with open_blended(place, stale) as pipeline, caplog.at_level(logging.WARNING):
        assert reused(pipeline.query(QUESTIONS[0])) == (0, 5)
        assert reused(pipeline.query(QUESTIONS[0])) == (5, 0)
    assert "were replaced since they were loaded" in caplog.text
    with open_blended(place, Engine.load(folder, device="cpu", dtype="float32")) as pipeline:
        assert reused(pipeline.query(QUESTIONS[0])) == (0, 5)
