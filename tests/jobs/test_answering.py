"""Many questions answered together give the answers that each gives alone, and none of them stops another."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from batch_world import FULL, load_engine, open_world, questions

from ragkit import Answer, Pipeline
from ragkit.answers.options import QuestionChanges
from ragkit.config import AnswerConfig, Strategy
from ragkit.errors import StoreMissingError
from ragkit.generation.batch_request import BatchRequest, BatchResult
from ragkit.generation.engine import Engine
from ragkit.generation.paging import PagedDocument, PagedText, Paging
from ragkit.jobs import answering, paged_rows, ray_answering, retrieved_rows
from ragkit.jobs.answering import answer_many
from ragkit.jobs.one_by_one import OneByOne
from ragkit.jobs.rows import QuestionRow


@pytest.fixture(scope="module")
def engine(world: Path) -> Engine:
    return load_engine(world)


@pytest.fixture
def pipeline(world: Path, engine: Engine) -> Iterator[Pipeline]:
    with open_world(world, engine) as pipeline:
        yield pipeline


def essence(answer: Answer | None) -> tuple[object, ...]:
    """What must be the same, however a question was asked."""
    assert answer is not None
    return answer.text, answer.found, answer.citations, answer.strategy, answer.tokens.prompt, answer.warnings


def rows_of(count: int, **changes: object) -> Iterator[QuestionRow]:
    for number, row in enumerate(questions(count)):
        yield QuestionRow(number, row["id"], row["question"], QuestionChanges(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["full", "blend", "auto"])
def test_answers_of_a_batch_are_those_of_single_questions(pipeline: Pipeline, strategy: str) -> None:
    rows = questions(6)
    alone = [pipeline.query(row["question"], strategy=strategy, k=4) for row in rows]
    together = list(pipeline.query_many([row["question"] for row in rows], strategy=strategy, k=4))
    assert [essence(outcome.answer) for outcome in together] == [essence(answer) for answer in alone]
    assert {answer.strategy for answer in alone} == ({"full", "blend"} if strategy == "auto" else {strategy})
    assert list(together[0].answer.timings_ms) == list(alone[0].timings_ms)


def test_rows_in_pages_do_not_wait_without_bound(
    pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragkit.jobs.answering._WAITING_PAGED", 2)
    uri = str(sorted((world / "docs").iterdir())[0])
    paged = [{"id": f"p{one}", "question": "Where?", "strategy": "pages", "document": uri} for one in range(5)]
    ended = [one.row.row_id for one in pipeline.query_many([*paged[:3], *questions(2), *paged[3:]], in_order=False)]
    assert ended[:2] == ["p0", "p1"]
    assert sorted(ended) == ["p0", "p1", "p2", "p3", "p4", "q0", "q1"]


def test_a_document_in_pages_is_answered_as_alone_and_last(pipeline: Pipeline, world: Path) -> None:
    uri = str(world / "docs" / "0.txt")
    asked = [{"id": "p", "question": "Where?", "strategy": "pages", "document": uri}, *questions(2)]
    outcomes = list(pipeline.query_many(asked, in_order=False))
    assert [outcome.row.row_id for outcome in outcomes] == ["q0", "q1", "p"]
    assert essence(outcomes[-1].answer) == essence(pipeline.query("Where?", strategy="pages", document=uri))
    assert [outcome.row.row_id for outcome in pipeline.query_many(asked)] == ["p", "q0", "q1"]


def paged(name: str, question: str, uri: str, **changes: object) -> dict[str, object]:
    return {"id": name, "question": question, "strategy": "pages", "document": uri, **changes}


def uris(world: Path) -> list[str]:
    return [str(path) for path in sorted((world / "docs").iterdir())]


def test_rows_in_pages_are_grouped_by_document_which_is_found_and_opened_once(
    pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = uris(world)
    asked = [
        paged(f"{at}{name}", f"Where {at}?", uri) for at in range(3) for name, uri in (("a", first), ("b", second))
    ]
    opened, looked_for = [], []
    real_open, real_find = Paging._opened, paged_rows.paged_document

    def opening(self: Paging, document: PagedText, system_prompt: str) -> PagedDocument:
        opened.append(document.doc_id)
        return real_open(self, document, system_prompt)

    monkeypatch.setattr(Paging, "_opened", opening)
    monkeypatch.setattr(
        paged_rows, "paged_document", lambda parts, options: looked_for.append(1) or real_find(parts, options)
    )
    outcomes = list(pipeline.query_many([*asked, *questions(1)], in_order=False))
    assert [outcome.row.row_id for outcome in outcomes] == ["q0", "0a", "1a", "2a", "0b", "1b", "2b"]
    assert len(opened) == len(set(opened)) == len(looked_for) == 2
    for outcome in outcomes[1:]:
        row = outcome.row
        alone = pipeline.query(row.question, strategy="pages", document=row.changes.document)
        assert essence(outcome.answer) == essence(alone)


def test_a_row_in_pages_that_fails_stops_no_other_of_its_document(pipeline: Pipeline, world: Path) -> None:
    uri = uris(world)[0]
    asked = [paged("p0", "Where?", uri), paged("long", "Where? " * 4000, uri), paged("p1", "When?", uri)]
    outcomes = {outcome.row.row_id: outcome for outcome in pipeline.query_many(asked)}
    assert outcomes["long"].error is not None
    assert outcomes["long"].error.code == "generation"
    assert all(outcomes[name].answer is not None for name in ("p0", "p1"))


def test_a_stop_while_a_document_is_read_leaves_its_rows_to_be_asked_again(
    pipeline: Pipeline, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, uri = Event(), uris(world)[2]  # which no other test has read
    changes = QuestionChanges(strategy="pages", document=uri)
    rows = [QuestionRow(at, f"p{at}", "Where?", changes) for at in range(2)]
    real, heard = Paging.read, []

    def read(self: Paging, *arguments: object) -> bool:
        stop.set()
        heard.append(arguments[-1])
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Paging, "read", read)
    assert list(answer_many(pipeline.parts, rows, stop=stop)) == []
    assert heard == [stop]
    monkeypatch.undo()
    assert [outcome.answer is not None for outcome in answer_many(pipeline.parts, rows)] == [True, True]


def test_shards_of_rows_in_pages_hold_one_document_and_its_first_rows_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_answering, "SHARD_ROWS", 2)

    def row(number: int, document: str | None, strategy: str | None = None) -> QuestionRow:
        return QuestionRow(number, number, "Where?", QuestionChanges(strategy=strategy, document=document))

    rows = [
        row(0, "a"),
        row(1, None),
        row(2, "b"),
        row(3, "a"),
        row(4, None),
        row(5, "a", "pages"),
        row(6, "b", "full"),
    ]
    found = [[one.number for one in shard] for shard in ray_answering.shards(rows, Strategy.AUTO)]
    assert found == [[1, 4], [6], [0, 3], [2], [5]]
    monkeypatch.setattr(ray_answering, "_WAITING_ROWS", 2)
    found = [[one.number for one in shard] for shard in ray_answering.shards(rows, Strategy.AUTO)]
    assert found == [[0], [2], [1, 4], [3, 5], [6]]
    assert [len(shard) for shard in ray_answering.shards(rows, Strategy.FULL)] == [2, 2, 2, 1]


def test_options_of_a_row_hold_for_that_row_alone(pipeline: Pipeline) -> None:
    question = questions(1)[0]["question"]
    asked = [{"question": question, "k": 2, "max_new_tokens": 2, "temperature": 0.8, "seed": 3}, question]
    own, plain = pipeline.query_many(asked)
    alone = pipeline.query(question, k=2, max_new_tokens=2, temperature=0.8, seed=3)
    assert essence(own.answer) == essence(alone)
    assert essence(plain.answer) == essence(pipeline.query(question))


def test_a_row_that_fails_while_it_generates_stops_no_other(pipeline: Pipeline) -> None:
    asked = [*questions(2), {"id": "long", "question": "Where? " * 4000}, *questions(3)[2:]]
    outcomes = {outcome.row.row_id: outcome for outcome in pipeline.query_many(asked)}
    assert outcomes["long"].error is not None
    assert outcomes["long"].error.code == "generation"
    assert all(outcomes[name].answer is not None for name in ("q0", "q1", "q2"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"seed": 2**64},
            r"generation.seed must be a whole number from -2^63 up to 2^64 - 1, got 18446744073709551616",
        ),
        ({"question": "Where is \ud83d?"}, r"the question has '\ud83d' at character 9"),
        ({"system_prompt": "\udc00"}, r"generation.system_prompt has '\udc00' at character 0"),
        ({"document": "a\udc00"}, r"document has '\udc00' at character 1"),
        ({"filter": {"uri": "\udc00"}}, r"the filter 'uri' has '\udc00' at character 3"),
    ],
)
def test_what_no_generator_or_text_can_hold_is_the_error_of_its_row(
    pipeline: Pipeline, row: dict[str, object], message: str
) -> None:
    good, *_ = questions(1)
    bad, after = pipeline.query_many([{**good, "temperature": 1.0, **row}, good])
    assert bad.error is not None
    assert bad.error.code in ("config", "usage")
    assert message in bad.error.message
    assert after.answer is not None


def test_more_chunks_than_there_are_may_be_asked_for(pipeline: Pipeline) -> None:
    question = questions(1)[0]["question"]
    most, all_of_them = pipeline.query_many([{"question": question, "k": k} for k in (10**30, 1000)])
    assert essence(most.answer) == essence(all_of_them.answer)


def test_what_is_no_row_is_an_error_of_its_own(pipeline: Pipeline) -> None:
    asked: list[Any] = [7, None, questions(1)[0]]
    outcomes = list(pipeline.query_many(asked))
    assert [one.error and one.error.code for one in outcomes] == ["corrupt", "corrupt", None]
    assert outcomes[0].error is not None
    assert outcomes[0].error.message.endswith("got 7")


def test_a_question_that_cannot_be_embedded_spoils_no_neighbour(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = pipeline.embedder.encode_queries

    def poisoned(texts: list[str]) -> object:
        if any("number 1?" in text for text in texts):
            raise ValueError("cannot be embedded")
        return encode(texts)

    monkeypatch.setattr(pipeline.embedder, "encode_queries", poisoned)
    outcomes = list(answer_many(pipeline.parts, rows_of(3)))
    assert [None if one.error is None else one.error.code for one in outcomes] in (
        [None, None, "internal"], ["internal", None, None], [None, "internal", None],
    )  # fmt: skip
    assert {one.row.row_id for one in outcomes if one.error} == {"q1"}


def test_a_missing_store_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreMissingError):
        Pipeline.open(tmp_path / "none").query_many(["a"])


def test_a_long_run_of_refusals_is_handed_on_before_the_end(
    world: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_WAITING_OUTCOMES", 10)
    monkeypatch.setattr(retrieved_rows, "WINDOW_ROWS", 5)
    pulled = 0

    def rows() -> Iterator[QuestionRow]:
        nonlocal pulled
        for row in rows_of(100):
            pulled += 1
            yield row

    refusing = replace(FULL, answers=AnswerConfig(found_threshold=1.0))
    with open_world(world, engine, refusing) as pipeline:
        outcomes = answer_many(pipeline.parts, rows())
        first = next(outcomes)
        assert first.answer is not None
        assert not first.answer.found
        assert pulled <= 30
        assert len(list(outcomes)) == 99


def test_threads_that_retrieve_end_with_their_window(
    world: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieved_rows, "WINDOW_ROWS", 5)
    with open_world(world, engine, FULL) as pipeline, retrieved_rows.RowRetrieval(pipeline.parts) as retrieval:
        found = retrieval.run(iter(rows_of(10)))
        assert next(found).row.row_id == "q0"
        concurrent.futures.wait((retrieval._latest,))
        deadline = time.monotonic() + 30
        while any(thread.name.startswith("ragkit-batch") for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [one.row.row_id for one in found] == [f"q{index}" for index in range(1, 10)]


def test_a_stop_ends_the_batch_and_gives_its_memory_back(pipeline: Pipeline) -> None:
    stop = Event()
    free = pipeline.engine.pool.num_free
    outcomes = answer_many(pipeline.parts, rows_of(50), stop=stop)
    next(outcomes)
    stop.set()
    assert len(list(outcomes)) < 45
    assert pipeline.engine.pool.num_free == free


def test_a_stop_while_requests_are_pulled_begins_none_of_them(pipeline: Pipeline) -> None:
    stop = Event()
    stop.set()
    assert list(answer_many(pipeline.parts, rows_of(3), stop=stop)) == []
    stop = Event()

    class Stopping:
        def run(self, requests: Iterable[BatchRequest]) -> Iterator[BatchResult]:
            pulled = iter(requests)
            next(pulled)
            stop.set()
            yield from OneByOne(pipeline.engine).run(list(pulled))

    assert list(answer_many(pipeline.parts, rows_of(3), generator=Stopping(), stop=stop)) == []


def test_the_generator_may_end_requests_in_any_order(pipeline: Pipeline) -> None:
    class Backwards:
        def run(self, requests: Iterable[BatchRequest]) -> Iterator[BatchResult]:
            return reversed(list(OneByOne(pipeline.engine).run(requests)))

    outcomes = list(answer_many(pipeline.parts, rows_of(3), generator=Backwards()))
    assert [one.row.row_id for one in outcomes] == ["q2", "q1", "q0"]
    for one in outcomes:
        assert essence(one.answer) == essence(pipeline.query(one.row.question, strategy=Strategy.FULL))
