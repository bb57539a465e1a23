"""Rows that read one document in pages are answered together, and everybody else may ask meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from batch_world import FULL, load_engine, open_world, questions

from ragkit import Answer, Pipeline
from ragkit.answers.options import QuestionChanges
from ragkit.config import CodecName, PagesConfig, PipelineConfig
from ragkit.errors import KVCacheError
from ragkit.generation.decoder import Decoder
from ragkit.generation.engine import Engine
from ragkit.generation.page_batch import PageBatch
from ragkit.generation.page_decode import PageSteps
from ragkit.generation.paged_question import PagedQuestion
from ragkit.generation.paging import Paging
from ragkit.jobs.answering import answer_many
from ragkit.jobs.rows import QuestionRow, RowOutcome

SMALL = PagesConfig(
    page_tokens=16, codec=CodecName.FP32, sink_tokens=32, budget_tokens=64, local_tokens=64, window_tokens=128
)
ANSWERS = (9, 5, 12, 7, 3, 8)


@pytest.fixture(scope="module")
def engine(world: Path) -> Engine:
    return load_engine(world)


@pytest.fixture
def pipeline(world: Path, engine: Engine) -> Iterator[Pipeline]:
    with open_world(world, engine, replace(FULL, pages=SMALL)) as pipeline:
        yield pipeline


def uri_of(world: Path, number: int) -> str:
    return str(world / "docs" / f"{number}.txt")


def rows_about(world: Path, *documents: int) -> list[dict[str, Any]]:
    """Return six rows about each document, whose answers have different lengths."""
    return [
        {**question, "id": f"{document}-{at}", "strategy": "pages", "document": uri_of(world, document),
         "max_new_tokens": ANSWERS[at]}
        for document in documents
        for at, question in enumerate(questions(6))
    ]  # fmt: skip


def essence(answer: Answer | None) -> tuple[object, ...]:
    assert answer is not None
    return answer.text, answer.citations, answer.attended, answer.tokens, answer.strategy, answer.warnings, answer.found


def alone(pipeline: Pipeline, row: dict[str, Any]) -> tuple[object, ...]:
    options = {name: value for name, value in row.items() if name not in ("id", "question")}
    return essence(pipeline.query(row["question"], **options))


def found(outcomes: Iterator[RowOutcome]) -> dict[str | int, tuple[object, ...]]:
    return {outcome.row.row_id: essence(outcome.answer) for outcome in outcomes}


def test_rows_of_a_document_are_answered_together_as_each_is_alone(
    pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_about(world, 0, 1)
    expected = {row["id"]: alone(pipeline, row) for row in rows}
    passes: list[int] = []
    step = PageSteps.step
    monkeypatch.setattr(
        PageSteps, "step", lambda self, tokens, choose: passes.append(len(tokens)) or step(self, tokens, choose)
    )
    assert found(pipeline.query_many(rows)) == expected
    assert sum(passes) == 2 * sum(count - 1 for count in ANSWERS)  # the first token of each follows from its question
    assert max(passes) == pipeline.config.batch.max_running == 4
    assert len(passes) < sum(passes) / 2.5


def test_drawn_answers_of_rows_follow_from_their_seeds(pipeline: Pipeline, world: Path) -> None:
    rows = [{**row, "temperature": 1.2, "top_p": 0.9, "seed": at} for at, row in enumerate(rows_about(world, 0))]
    assert found(pipeline.query_many(rows)) == {row["id"]: alone(pipeline, row) for row in rows}


def test_an_answer_of_a_row_has_the_form_of_a_single_one(pipeline: Pipeline, world: Path) -> None:
    row = rows_about(world, 2)[0]
    single = pipeline.query(row["question"], strategy="pages", document=row["document"])
    [outcome] = pipeline.query_many([row])
    answer = outcome.answer
    assert answer is not None
    assert list(answer.timings_ms) == [name for name in single.timings_ms if name != "read_document"]
    assert answer.timings_ms["prefill"] <= answer.timings_ms["first_token"] < answer.timings_ms["total"]
    assert answer.timings_ms["load_models"] == 0
    assert answer.kv.hits > 0
    assert outcome.cut


def test_the_first_answer_says_what_reading_its_document_took(world: Path, engine: Engine) -> None:
    config = replace(FULL, pages=replace(SMALL, sink_tokens=16))  # no other test reads it so
    with open_world(world, engine, config) as pipeline:
        answers = [outcome.answer for outcome in pipeline.query_many(rows_about(world, 0), in_order=False)]
    assert all(answer is not None for answer in answers)
    read = [answer.timings_ms.get("read_document", 0.0) for answer in answers if answer is not None]
    assert read[0] > 0
    assert not any(read[1:])
    assert answers[0] is not None
    assert read[0] < answers[0].timings_ms["first_token"] < answers[0].timings_ms["total"]


def test_questions_about_other_documents_may_be_asked_between_two_outcomes(pipeline: Pipeline, world: Path) -> None:
    rows = rows_about(world, 0)
    expected = {row["id"]: alone(pipeline, row) for row in rows}
    other = rows_about(world, 1)[0]
    about_another = alone(pipeline, other)
    outcomes = pipeline.query_many(rows, in_order=False)
    got = {}
    for outcome in outcomes:
        got[outcome.row.row_id] = essence(outcome.answer)
        assert alone(pipeline, other) == about_another  # the rows' document was closed, and is opened again
        assert not pipeline.parts.paging._users
    assert got == expected


def test_a_batch_that_nobody_goes_on_with_keeps_no_document_from_others(pipeline: Pipeline, world: Path) -> None:
    outcomes = pipeline.query_many(rows_about(world, 0), in_order=False)
    next(outcomes)
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(alone, pipeline, rows_about(world, one)[0]) for one in (1, 0)]
        assert all(one.result(timeout=60) for one in waiting)
    assert len(list(outcomes)) == 5


def test_threads_that_ask_about_the_document_of_a_batch_have_their_turns(pipeline: Pipeline, world: Path) -> None:
    rows = [{**row, "max_new_tokens": 30} for row in rows_about(world, 0)]
    expected = {row["id"]: alone(pipeline, row) for row in rows}
    with ThreadPoolExecutor(3) as pool:
        batch = pool.submit(lambda: found(pipeline.query_many(rows)))
        others = {row["id"]: pool.submit(alone, pipeline, row) for row in rows[:2]}
        assert batch.result(timeout=120) == expected
        assert all(other.result(timeout=120) == expected[name] for name, other in others.items())


def test_two_batches_over_two_documents_end_both(pipeline: Pipeline, world: Path) -> None:
    rows = {number: rows_about(world, number) for number in (0, 1)}
    expected = {number: {row["id"]: alone(pipeline, row) for row in some} for number, some in rows.items()}
    with ThreadPoolExecutor(2) as pool:
        asked = {
            number: pool.submit(lambda some=some: found(pipeline.query_many(some))) for number, some in rows.items()
        }
        assert {number: one.result(timeout=120) for number, one in asked.items()} == expected


def test_a_row_whose_page_is_gone_stops_no_other(
    pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_about(world, 0)
    expected = {row["id"]: alone(pipeline, row) for row in rows}
    read = PagedQuestion.read

    def failing(self: PagedQuestion) -> object:
        if self.sampling.max_new_tokens == ANSWERS[2]:
            raise KVCacheError("a page is gone")
        return read(self)

    monkeypatch.setattr(PagedQuestion, "read", failing)
    outcomes = {outcome.row.row_id: outcome for outcome in pipeline.query_many(rows)}
    error = outcomes.pop("0-2").error
    assert error is not None
    assert (error.code, error.message) == ("kvcache", "a page is gone")
    assert {name: essence(one.answer) for name, one in outcomes.items()} == {
        name: one for name, one in expected.items() if name != "0-2"
    }


def test_a_question_that_cannot_be_tokenised_is_the_error_of_its_row(
    pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_about(world, 0)
    builder = type(pipeline.engine.prompt_builder())
    ending = builder.ending

    def failing(self: object, question: str) -> object:
        if "number 5?" in question:
            raise ValueError("no tokens")
        return ending(self, question)

    monkeypatch.setattr(builder, "ending", failing)
    outcomes = {outcome.row.row_id: outcome for outcome in pipeline.query_many(rows)}
    error = outcomes["0-5"].error
    assert error is not None
    assert (error.code, error.message) == ("internal", "ValueError: no tokens")
    assert sum(one.answer is not None for one in outcomes.values()) == 5


def test_a_document_that_cannot_be_opened_is_the_error_of_each_row_and_others_go_on(
    pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, tried = Paging._opened, []
    text = Path(uri_of(world, 0)).read_text(encoding="utf-8")

    def failing(self: Paging, document: Any, system_prompt: str) -> object:
        if document.text == text:
            tried.append(1)
            if len(tried) < 3:
                raise KVCacheError("the disk is full")
        return opening(self, document, system_prompt)

    monkeypatch.setattr(Paging, "_opened", failing)
    outcomes = list(pipeline.query_many(rows_about(world, 0, 1)))
    assert [one.error and one.error.code for one in outcomes] == ["kvcache"] * 2 + [None] * 10


def test_a_disk_that_fails_ends_the_job(pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: PageSteps, *arguments: object) -> object:
        raise OSError("the disk is gone")

    monkeypatch.setattr(PageSteps, "step", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        list(pipeline.query_many(rows_about(world, 0)))


def test_a_stop_in_the_middle_of_answers_leaves_their_rows_to_be_asked_again(
    pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, steps, step = Event(), [], PageSteps.step
    changes = QuestionChanges(strategy="pages", document=uri_of(world, 0))
    rows = [
        QuestionRow(at, f"p{at}", row["question"], replace(changes, max_new_tokens=ANSWERS[at]))
        for at, row in enumerate(questions(6))
    ]

    def stopping(self: PageSteps, *arguments: Any) -> object:
        steps.append(1)
        if len(steps) == 6:
            stop.set()
        return step(self, *arguments)

    monkeypatch.setattr(PageSteps, "step", stopping)
    first = found(answer_many(pipeline.parts, rows, stop=stop))
    assert len(steps) == 6
    assert set(first) == {"p1", "p3", "p4"}
    monkeypatch.undo()
    left = [row for row in rows if row.row_id not in first]
    rest = found(answer_many(pipeline.parts, left))
    assert first | rest == found(answer_many(pipeline.parts, rows))


def test_a_document_that_closed_meanwhile_has_its_questions_begun_again(
    pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "max_new_tokens": 4 + 3 * at} for at, row in enumerate(rows_about(world, 0)[:3])]
    expected = {row["id"]: alone(pipeline, row) for row in rows}
    begun, read = [], PagedQuestion.read
    monkeypatch.setattr(PagedQuestion, "read", lambda self: begun.append(self.sampling.max_new_tokens) or read(self))
    outcomes = pipeline.query_many(rows, in_order=False)
    got = [next(outcomes)]
    assert begun == [4, 7, 10]
    pipeline.parts.paging.close()
    got += list(outcomes)
    assert begun == [4, 7, 10, 7, 10]
    assert found(iter(got)) == expected


def test_no_more_rows_run_than_a_batch_may(world: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    config: PipelineConfig = replace(FULL, pages=SMALL, batch=replace(FULL.batch, max_running=2))
    batches: list[PageBatch] = []
    advance = PageBatch.advance
    monkeypatch.setattr(PageBatch, "advance", lambda self: batches.append(self) or advance(self))
    with open_world(world, engine, config) as pipeline:
        list(pipeline.query_many(rows_about(world, 0)))
    assert len({id(batch) for batch in batches}) == 1
    assert batches[0].stats.running_peak == 2


def test_weights_are_read_once_a_step(pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**row, "max_new_tokens": 6} for row in rows_about(world, 0)[:4]]
    list(pipeline.query_many(rows))  # reads the document
    passes: list[int] = []
    run = Decoder.run
    monkeypatch.setattr(
        Decoder, "run", lambda self, tokens, attend: passes.append(len(tokens)) or run(self, tokens, attend)
    )
    list(pipeline.query_many(rows))
    assert passes[4:] == [4] * 5
