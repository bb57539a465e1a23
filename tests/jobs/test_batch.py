"""A batch from a file of questions to a file of answers: resumed, refused, replaced, here and at a URL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from batch_world import FULL, load_engine, open_world, questions, read_jsonl, write_jsonl

from ragkit import Pipeline
from ragkit.config import DraftMode, Strategy
from ragkit.errors import ModelError, OfflineError, UsageError
from ragkit.generation.engine import Engine
from ragkit.jobs import batch, job_folder
from ragkit.jobs.answering import answer_many
from ragkit.jobs.batch import BatchJob, run_batch
from ragkit.jobs.batch_estimate import estimate_batch
from ragkit.jobs.rows import QuestionRow, RowOutcome


@pytest.fixture(scope="module")
def engine(world: Path) -> Engine:
    return load_engine(world)


@pytest.fixture
def pipeline(world: Path, engine: Engine) -> Iterator[Pipeline]:
    with open_world(world, engine) as pipeline:
        yield pipeline


class Counted:
    """Answers as always, counts the questions, and stops the process's work after some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        self.asked: list[str | int] = []
        self.stop = Event()
        self._stop_after = stop_after
        monkeypatch.setattr(batch, "open_answers", lambda parts, stop: lambda rows: self._answer(parts, rows))

    def _answer(self, parts: Any, rows: Iterable[QuestionRow]) -> Iterator[RowOutcome]:
        for outcome in answer_many(parts, rows, stop=self.stop):
            self.asked.append(outcome.row.row_id)
            yield outcome
            if len(self.asked) == self._stop_after:
                self.stop.set()
                return


def begun(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, job: BatchJob, rows: int) -> set[str | int]:
    """Begin a job, leave it after so many rows, and return their ids."""
    with monkeypatch.context() as patch:
        counted = Counted(patch, rows)
        assert run_batch(pipeline.parts, job, stop=counted.stop).interrupted
    assert len(counted.asked) == rows
    return set(counted.asked)


def test_every_row_has_its_answer_in_the_order_of_the_input(pipeline: Pipeline, tmp_path: Path) -> None:
    rows = questions(5)
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", rows)), str(tmp_path / "a.jsonl"))
    report = run_batch(pipeline.parts, job)
    assert (report.rows, report.answered, report.failed, report.interrupted) == (5, 5, 0, False)
    written = read_jsonl(tmp_path / "a.jsonl")
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert [row["answer"] for row in written] == [pipeline.query(row["question"]).text for row in rows]
    assert written[0]["citations"][0].keys() >= {"uri", "page", "char_start", "char_stop", "quote", "score"}
    assert written[0]["tokens"]["generated"] == 4
    assert report.tokens["generated"] == 20
    assert not (tmp_path / "a.jsonl.partial").exists()


def test_a_bad_row_is_an_error_of_its_own(pipeline: Pipeline, tmp_path: Path) -> None:
    rows = [*questions(1), "no JSON", {"id": "k", "question": "Where?", "k": "many"}, {"id": "e", "question": " "},
            {"id": "d", "question": "Where?", "document": "absent.txt"}, {"id": "s", "question": "Where \ud800?"},
            {"id": "p", "question": "Where?", "strategy": "pages"}, *questions(2)[1:]]  # fmt: skip
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", rows)), str(tmp_path / "a.jsonl"))
    report = run_batch(pipeline.parts, job)
    written = {row["id"]: row for row in read_jsonl(tmp_path / "a.jsonl")}
    assert (report.rows, report.answered + report.failed) == (8, 8)
    assert {name: row["error"]["code"] for name, row in written.items() if "error" in row and name != "s"} == {
        "row-2": "corrupt", "k": "usage", "e": "usage", "d": "usage", "p": "usage",
    }  # fmt: skip
    assert "answer" in written["q0"]
    assert "answer" in written["q1"]
    assert written["row-2"]["error"]["message"].startswith("line 2 is not JSON")
    assert {failure.id for failure in report.failures} >= {"row-2", "k", "e", "d", "p"}


def test_a_second_run_asks_only_what_is_left(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", questions(6))), str(tmp_path / "a.jsonl"))
    done = begun(pipeline, monkeypatch, job, 2)
    assert not (tmp_path / "a.jsonl").exists()
    rest = Counted(monkeypatch)
    report = run_batch(pipeline.parts, job)
    assert (report.resumed, report.answered) == (2, 6)
    assert sorted(rest.asked) == sorted({row["id"] for row in questions(6)} - done)
    assert len(read_jsonl(tmp_path / "a.jsonl")) == 6


def test_other_rows_are_refused_with_the_difference(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = questions(6)
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    job = BatchJob(str(path), str(tmp_path / "a.jsonl"))
    begun(pipeline, monkeypatch, job, 2)
    write_jsonl(path, [rows[0], {**rows[1], "question": "Another one?"}, *rows[2:5]])
    with pytest.raises(UsageError, match=r"had 6 rows and has 5; row 2 \(id 'q1'\) has another question"):
        run_batch(pipeline.parts, job)
    write_jsonl(path, rows)
    assert run_batch(pipeline.parts, job).resumed == 2


def test_other_settings_are_refused_with_the_difference_and_overwrite_begins_anew(
    world: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", questions(4))), str(tmp_path / "a.jsonl"))
    with open_world(world, engine) as pipeline:
        begun(pipeline, monkeypatch, job, 2)
    warmer = replace(FULL, generation=replace(FULL.generation, temperature=0.5))
    with open_world(world, engine, warmer) as pipeline:
        with pytest.raises(UsageError, match=r"generation\.temperature was 0\.0 and is 0\.5"):
            run_batch(pipeline.parts, job)
        report = run_batch(pipeline.parts, replace(job, overwrite=True))
        assert (report.resumed, report.answered) == (0, 4)


def test_the_same_rows_in_another_form_are_the_same_job(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = questions(4)
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", rows)), str(tmp_path / "a.jsonl"))
    begun(pipeline, monkeypatch, job, 2)
    csv = tmp_path / "q.csv"
    csv.write_text("id,question\n" + "".join(f"{row['id']},{row['question']}\n" for row in rows))
    assert run_batch(pipeline.parts, replace(job, questions=str(csv))).resumed == 2


def test_answers_that_are_there_are_kept_unless_told_otherwise(pipeline: Pipeline, tmp_path: Path) -> None:
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", questions(2))), str(tmp_path / "a.jsonl"))
    run_batch(pipeline.parts, job)
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(UsageError, match="is there already, and whole"):
        run_batch(pipeline.parts, job)
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert not (tmp_path / "a.jsonl.partial").exists()
    assert run_batch(pipeline.parts, replace(job, overwrite=True)).answered == 2


def test_a_changed_store_is_said_and_gone_on_with(
    world: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_world(world, engine) as pipeline:
        job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", questions(4))), str(tmp_path / "a.jsonl"))
        begun(pipeline, monkeypatch, job, 2)
        (tmp_path / "new.txt").write_text("The lamp is new.\n")
        pipeline.ingest([tmp_path / "new.txt"])
        report = run_batch(pipeline.parts, job)
        pipeline.remove([str(tmp_path / "new.txt")])
    assert report.resumed == 2
    assert any("the store changed since the job was begun" in warning for warning in report.warnings)


def test_limit_takes_the_first_rows(pipeline: Pipeline, tmp_path: Path) -> None:
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", questions(5))), str(tmp_path / "a.jsonl"), limit=2)
    assert run_batch(pipeline.parts, job).rows == 2
    assert [row["id"] for row in read_jsonl(tmp_path / "a.jsonl")] == ["q0", "q1"]


def test_duplicate_ids_are_named_before_anything_runs(pipeline: Pipeline, tmp_path: Path) -> None:
    rows = [*questions(3), {"id": "q1", "question": "Again?"}, {"id": 7, "question": "x"}, {"id": "7", "question": "y"}]
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", rows)), str(tmp_path / "a.jsonl"))
    with pytest.raises(UsageError, match=r"'q1' \(rows 2, 4\), '7' \(rows 5, 6\)"):
        run_batch(pipeline.parts, job)
    assert list(tmp_path.iterdir()) == [tmp_path / "q.jsonl"]


def test_parquet_holds_the_same_answers(pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [*questions(3), {"id": "bad", "question": "Where?", "k": 0}])
    run_batch(pipeline.parts, BatchJob(str(path), str(tmp_path / "a.jsonl")))
    run_batch(pipeline.parts, BatchJob(str(path), str(tmp_path / "a.parquet")))
    lines, table = read_jsonl(tmp_path / "a.jsonl"), pq.read_table(tmp_path / "a.parquet").to_pylist()
    for line, row in zip(lines, table, strict=True):
        for name in ("id", "answer", "citations", "strategy", "tokens", "error"):
            assert row[name] == line.get(name), name
    assert dict(table[0]["timings_ms"]).keys() == lines[0]["timings_ms"].keys()
    assert table[0]["draft"].keys() == lines[0]["draft"].keys()


def test_drafting_that_is_configured_holds_for_every_row_that_says_nothing_else(
    world: Path, engine: Engine, tmp_path: Path
) -> None:
    rows = [*questions(3), {**questions(4)[3], "draft": "none"}, {**questions(5)[4], "draft": "self"}]
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", rows)), str(tmp_path / "a.jsonl"))
    config = replace(FULL, draft=replace(FULL.draft, drafter="lookup"))
    with open_world(world, engine, config) as pipeline:
        run_batch(pipeline.parts, job)
        plain = [pipeline.query(row["question"], draft="none").text for row in rows]
    written = read_jsonl(tmp_path / "a.jsonl")
    assert [row["answer"] for row in written] == plain
    assert [row["draft"]["drafter"] for row in written] == [*["lookup"] * 3, "", "self"]
    assert [row["draft"]["mode"] for row in written] == [*["exact"] * 3, "none", "exact"]


def test_drafts_that_move_answers_are_a_setting_of_the_job_and_others_are_not(
    world: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", questions(3))), str(tmp_path / "a.jsonl"))
    drafted = replace(FULL, draft=replace(FULL.draft, drafter="self"))
    with open_world(world, engine) as pipeline:
        begun(pipeline, monkeypatch, job, 1)
    moved = replace(drafted, draft=replace(drafted.draft, mode=DraftMode.TRANSFER))
    with open_world(world, engine, moved) as pipeline, pytest.raises(UsageError, match=r"draft\.mode was None and is"):
        run_batch(pipeline.parts, job)
    with open_world(world, engine, drafted) as pipeline:
        assert run_batch(pipeline.parts, job).resumed == 1


def test_a_drafter_that_cannot_be_loaded_is_an_error_of_its_row(pipeline: Pipeline, tmp_path: Path) -> None:
    rows = [*questions(1), {"id": "bad", "question": "Where?", "draft": "no-such-model"},
            {"id": "mode", "question": "Where?", "draft_mode": "transfer"}]  # fmt: skip
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", rows)), str(tmp_path / "a.jsonl"))
    run_batch(pipeline.parts, job)
    written = {row["id"]: row for row in read_jsonl(tmp_path / "a.jsonl")}
    assert "answer" in written["q0"]
    assert "no-such-model" in written["bad"]["error"]["message"]
    assert "name a drafter" in written["mode"]["error"]["message"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_document_or_drafter_of_the_command_that_is_not_there_is_refused_at_once(
    world: Path, engine: Engine, tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "a.jsonl"
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", questions(2))), str(out), overwrite=overwrite)
    drafted = replace(FULL, draft=replace(FULL.draft, drafter="no-such-model"))
    for run in (run_batch, estimate_batch):
        with open_world(world, engine) as pipeline, pytest.raises(UsageError, match="holds no document 'absent'"):
            run(pipeline.parts, replace(job, document="absent"))
        with open_world(world, engine, drafted) as pipeline, pytest.raises(ModelError, match="no-such-model"):
            run(pipeline.parts, job)
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_the_ratio_of_the_command_is_said_where_it_had_no_part_and_is_not_that_of_other_strategies(
    world: Path, engine: Engine, tmp_path: Path
) -> None:
    question = questions(1)[0]["question"]
    rows = [{"id": "auto", "question": question}, {"id": "full", "question": question, "strategy": "full"},
            {"id": "own", "question": question, "strategy": "full", "ratio": 0.2},
            {"id": "blend", "question": question, "strategy": "blend"}]  # fmt: skip
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", rows)), str(tmp_path / "a.jsonl"), ratio=0.3)
    auto = replace(
        FULL,
        generation=replace(FULL.generation, strategy=Strategy.AUTO),
        blend=replace(FULL.blend, ratio=0.3, min_tokens=2048),
    )
    with open_world(world, engine, auto) as pipeline:
        run_batch(pipeline.parts, job)
        alone = pipeline.query(question, ratio=0.3)
    written = {row["id"]: row for row in read_jsonl(tmp_path / "a.jsonl")}
    assert written["auto"]["warnings"] == list(alone.warnings) == ["the ratio 0.3 had no part: the strategy was full"]
    assert written["full"]["warnings"] == written["blend"]["warnings"] == []
    assert "leave the ratio out" in written["own"]["error"]["message"]


def test_answers_do_not_replace_the_questions(pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(1))
    before = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    for out in (path, tmp_path / "link.jsonl", f"file://{path}"):
        with pytest.raises(UsageError, match="is the file of questions"):
            run_batch(pipeline.parts, BatchJob(str(path), str(out), overwrite=True))
    assert path.read_bytes() == before


def test_an_id_that_no_parquet_can_hold_is_escaped(pipeline: Pipeline, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"id": "half \ud800", "question": "Where?"}])
    run_batch(pipeline.parts, BatchJob(str(path), str(tmp_path / "a.parquet")))
    assert pq.read_table(tmp_path / "a.parquet").column("id").to_pylist() == ["half \\ud800"]


@pytest.mark.parametrize("name", ["questions", "out"])
def test_a_url_with_the_wrong_ending_is_named_without_credentials(
    pipeline: Pipeline, tmp_path: Path, name: str
) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(1))
    job = replace(BatchJob(str(path), str(tmp_path / "a.jsonl")), **{name: "s3://me:hunter2@bucket/file.txt"})
    with pytest.raises(UsageError, match=r"s3://bucket/file\.txt") as caught:
        run_batch(pipeline.parts, job)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "[2024] *.jsonl"])
@pytest.mark.parametrize("moves", [False, True])
def test_a_job_at_a_url_is_resumed_there(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, moves: bool
) -> None:
    if not moves:  # as on stores of objects, which show no half-written file
        monkeypatch.setattr(job_folder, "appears_whole", lambda files: True)
    files = fsspec.filesystem("memory")
    files.pipe_file("/jobs/q.jsonl", write_jsonl(tmp_path / "q.jsonl", questions(5)).read_bytes())
    job = BatchJob("memory://jobs/q.jsonl", f"memory://jobs/{name}")
    done = begun(pipeline, monkeypatch, job, 3)
    assert {Path(path).name for path in files.find(f"/jobs/{name}.partial")} == {
        "job.json", "rows.jsonl", "results.log-00000000",
    }  # fmt: skip
    rest = Counted(monkeypatch)
    assert run_batch(pipeline.parts, job).resumed == 3
    assert sorted(rest.asked) == sorted({row["id"] for row in questions(5)} - done)
    assert files.cat_file(f"/jobs/{name}").count(b"\n") == 5
    assert files.find(f"/jobs/{name}.partial") == []
    with pytest.raises(UsageError, match="is there already"):
        run_batch(pipeline.parts, job)
    files.rm_file(f"/jobs/{name}")


def test_openai_lines_are_answered_in_their_shape(pipeline: Pipeline, tmp_path: Path) -> None:
    body = {"model": "gpt-4o", "max_tokens": 3, "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the lamp?"}]}  # fmt: skip
    lines = [
        {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "two", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "n": 3}},
    ]
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", lines)), str(tmp_path / "a.jsonl"))
    report = run_batch(pipeline.parts, job)
    one, two = read_jsonl(tmp_path / "a.jsonl")
    alone = pipeline.query("Where is the lamp?", system_prompt="Be brief.", max_new_tokens=3)
    assert (one["custom_id"], one["error"], one["response"]["status_code"]) == ("one", None, 200)
    [choice] = one["response"]["body"]["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (alone.text, "length")
    assert one["response"]["body"]["usage"]["completion_tokens"] == 3
    assert one["response"]["body"]["ragkit"]["citations"]
    assert (two["response"], two["error"]["code"]) == (None, "usage")
    assert (report.answered, report.failed) == (1, 1)
    assert "1 line asks for 'gpt-4o'; the configured model answers" in report.warnings
    with pytest.raises(UsageError, match=r"give --out FILE\.jsonl"):
        run_batch(pipeline.parts, replace(job, out=str(tmp_path / "a.parquet")))


def test_an_estimate_writes_nothing_and_counts_what_a_run_counts(pipeline: Pipeline, tmp_path: Path) -> None:
    rows = [*questions(6), {"id": "bad", "question": "", "k": 0}]
    job = BatchJob(str(write_jsonl(tmp_path / "q.jsonl", rows)), str(tmp_path / "a.jsonl"))
    estimate = estimate_batch(pipeline.parts, job)
    assert list(tmp_path.iterdir()) == [tmp_path / "q.jsonl"]
    report = run_batch(pipeline.parts, job)
    assert (estimate.rows, estimate.bad_rows, estimate.sampled_rows) == (7, 1, 7)
    assert (estimate.prompt_tokens, estimate.answer_tokens) == (report.tokens["prompt"], report.tokens["generated"])
    assert min(estimate.seconds, estimate.prefill_tokens_per_second, estimate.decode_tokens_per_second) > 0
    assert estimate.row_kv_bytes == pipeline.engine.decoder.layout.bytes_per_token * max(
        row["tokens"]["prompt"] + 4 for row in read_jsonl(tmp_path / "a.jsonl") if "tokens" in row
    )


@pytest.mark.parametrize(("questions", "out"), [("s3://bucket/q.jsonl", "a.jsonl"), ("q.jsonl", "s3://bucket/a.jsonl")])
def test_nothing_is_fetched_where_fetching_is_off(world: Path, engine: Engine, questions: str, out: str) -> None:
    with (
        open_world(world, engine, replace(FULL, offline=True)) as pipeline,
        pytest.raises(OfflineError, match="s3://bucket"),
    ):
        run_batch(pipeline.parts, BatchJob(questions, out))
