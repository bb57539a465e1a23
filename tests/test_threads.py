"""One pipeline, many threads: every answer is the one that a thread alone gets, and everything is free afterwards."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from blended_pipeline import CONFIG, QUESTIONS, open_blended, text_of, write_documents
from doubles import HashEmbedder
from tiny_generator import write_generator

from ragkit import Answer, Pipeline
from ragkit.config import PipelineConfig, RetrievalConfig, SearchMode, Strategy
from ragkit.generation.engine import Engine
from ragkit.parts import Parts

SEEDS = range(3)
CASES = [(question, seed, strategy) for question in QUESTIONS for seed in SEEDS for strategy in ("full", "blend")]
# By BM25 every commit would change the scores of all chunks, and so the answers.
QUIET = replace(CONFIG, retrieval=RetrievalConfig(k=5, mode=SearchMode.DENSE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_generator(tmp_path_factory.mktemp("tiny"))


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs", SEEDS)


def opened(tmp_path: Path, folder: Path, documents: Path, config: PipelineConfig = QUIET) -> Pipeline:
    # Room for two or three requests: the others have to wait for their turn.
    engine = Engine.load(folder, device="cpu", dtype="float32", kv_tokens=2048)
    pipeline = open_blended(tmp_path / "store", engine, config)
    pipeline.ingest([documents])
    return pipeline


@pytest.fixture
def pipeline(tmp_path: Path, folder: Path, documents: Path) -> Iterator[Pipeline]:
    with opened(tmp_path, folder, documents) as pipeline:
        yield pipeline


def ask(pipeline: Pipeline, documents: Path, question: str, seed: int, strategy: str) -> Answer:
    return pipeline.query(question, document=str(documents / f"{seed}.txt"), strategy=strategy)


def said(answer: Answer) -> tuple[object, ...]:
    return answer.text, answer.found, answer.strategy, answer.citations, answer.tokens.prompt, answer.tokens.generated


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    with ThreadPoolExecutor(count) as pool:
        return [future.result(timeout=240) for future in [pool.submit(work, index) for index in range(count)]]


def test_everything_at_once_gives_the_answers_of_one_after_another(pipeline: Pipeline, documents: Path, tmp_path: Path):
    expected = {case: said(ask(pipeline, documents, *case)) for case in CASES}
    found = {seed: pipeline.search("river stone", filter={"uri": str(documents / f"{seed}.txt")}) for seed in SEEDS}
    free = pipeline.engine.pool.num_free
    coming = tmp_path / "coming"
    coming.mkdir()
    over = threading.Event()

    def reader(index: int) -> int:
        chance, done = random.Random(index), 0
        for case in chance.sample(CASES, 10):
            question, seed, strategy = case
            uri = str(documents / f"{seed}.txt")
            kind = chance.choice(("query", "stream", "half", "search"))
            if kind == "query":
                assert said(ask(pipeline, documents, *case)) == expected[case]
            elif kind == "stream":
                stream = pipeline.stream(question, document=uri, strategy=strategy)
                assert "".join(stream).strip() == expected[case][0]
                assert said(stream.answer) == expected[case]
            elif kind == "half":
                stream = pipeline.stream(question, document=uri, strategy=strategy)
                assert expected[case][0].startswith(next(stream).lstrip())
                stream.close()
            else:
                hits = pipeline.search("river stone", filter={"uri": uri}).hits
                assert [(hit.chunk_id, hit.score) for hit in hits] == [
                    (hit.chunk_id, hit.score) for hit in found[seed].hits
                ]
            done += 1
        return done

    def writer() -> int:
        rounds = 0
        while not over.is_set():
            path = coming / f"{rounds % 4}.txt"
            path.write_text(text_of(100 + rounds, sentences=6), encoding="utf-8")
            report = pipeline.ingest([coming])
            assert not report.failed
            if rounds % 3 == 2:
                assert pipeline.remove([str(path)]) == (str(path),)
                path.unlink()
            rounds += 1
            time.sleep(0.01)
        return rounds

    with ThreadPoolExecutor(1) as alone:
        writing = alone.submit(writer)
        try:
            assert in_threads(8, reader) == [10] * 8
        finally:
            over.set()
        assert writing.result(timeout=60) > 3
    assert pipeline.engine.pool.num_free == free
    assert {case: said(ask(pipeline, documents, *case)) for case in CASES} == expected


def test_an_answer_survives_the_removal_of_its_documents(pipeline: Pipeline, documents: Path):
    uri = str(documents / "0.txt")
    expected = pipeline.query(QUESTIONS[0], document=uri)
    stream = pipeline.stream(QUESTIONS[0], document=uri)
    next(stream)
    pipeline.remove([uri])
    assert stream.answer.text == expected.text
    assert [citation.quote for citation in stream.answer.citations] == [one.quote for one in expected.citations]


def test_parts_are_loaded_once_by_the_first_of_many_threads(tmp_path: Path, folder: Path, documents: Path):
    with opened(tmp_path, folder, documents) as pipeline:
        expected = [said(ask(pipeline, documents, *case)) for case in CASES[:8]]
    config = replace(QUIET, generation=replace(QUIET.generation, model=str(folder), strategy=Strategy.AUTO))
    with Pipeline.open(tmp_path / "store", config, embedder=HashEmbedder()) as cold:
        answers = in_threads(8, lambda index: ask(cold, documents, *CASES[index]))
    assert [said(answer) for answer in answers] == expected
    assert all(answer.timings_ms["total"] > 0 for answer in answers)
    assert all(answer.timings_ms["first_token"] > 0 for answer in answers)


def test_waiting_for_another_threads_model_counts_as_loading(tmp_path: Path):
    parts = Parts(tmp_path, PipelineConfig())
    begun, seconds = threading.Event(), {}

    def load() -> str:
        begun.set()
        time.sleep(0.2)
        return "loaded"

    def use(name: str) -> None:
        parts._part("model", load, is_model=True)
        seconds[name] = parts.load_seconds()

    first = threading.Thread(target=use, args=("loads",))
    first.start()
    begun.wait(5)
    second = threading.Thread(target=use, args=("waits",))
    second.start()
    first.join()
    second.join()
    use("finds it there")
    assert seconds["loads"] >= 0.2
    assert 0.05 < seconds["waits"] <= seconds["loads"] + 0.05
    assert seconds["finds it there"] == 0
