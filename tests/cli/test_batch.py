"""`ragkit batch`: what it passes on, what it says, and how it exits."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
from pipeline_double import FakePipeline

from ragkit.config import DraftMode, Strategy
from ragkit.errors import StoreSpaceError, UsageError
from ragkit.jobs import batch, batch_estimate
from ragkit.jobs.batch import BatchJob
from ragkit.jobs.batch_estimate import BatchEstimate
from ragkit.jobs.batch_report import BatchReport, FailedRow
from ragkit.jobs_config import ExecutorName

REPORT = BatchReport(
    out="a.jsonl", rows=1200, answered=1200, not_found=3, tokens={"generated": 61_000}, kv={"hits": 30, "misses": 10},
    seconds=64.0, rows_per_second=18.75, tokens_per_second=953.1,
)  # fmt: skip
FAILED = replace(REPORT, answered=1199, failed=1, failures=(FailedRow("q7", "usage", "k must be a whole number"),))
ESTIMATE = BatchEstimate(
    rows=1200, bad_rows=1, sampled_rows=32, prompt_tokens=2_000_000, answer_tokens=300_000, retrieve_ms=20.0,
    prefill_tokens_per_second=900.0, decode_tokens_per_second=120.0, seconds=4742.0, row_kv_bytes=46_000_000,
    stored_kv_bytes=2_100_000_000, paged_rows=0, warnings=(),
)  # fmt: skip


class Batches:
    """Stands for `run_batch`."""

    def __init__(self) -> None:
        self.report = REPORT
        self.error: Exception | None = None
        self.signal: int | None = None
        self.jobs: list[BatchJob] = []

    def __call__(self, parts, job, *, progress, stop):
        self.jobs.append(job)
        if self.error is not None:
            raise self.error
        if self.signal is not None:
            os.kill(os.getpid(), self.signal)
            assert stop.wait(10)
        return self.report


@pytest.fixture(autouse=True)
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    monkeypatch.setattr(FakePipeline, "parts", object(), raising=False)
    batches = Batches()
    monkeypatch.setattr(batch, "run_batch", batches)
    monkeypatch.setattr(batch_estimate, "estimate_batch", lambda parts, job: ESTIMATE)
    return batches


def test_the_counts_go_to_stdout_and_the_speed_to_stderr(run, batches):
    result = run("batch", "q.jsonl", "--out", "a.jsonl")
    assert result.code == 0
    assert result.out == "1,200 answered (3 not found); 61,000 tokens\nwritten to a.jsonl\n"
    assert result.err == "1:04 with loading, 18.75 rows/s, 953.1 tokens/s, 75% of chunk KV found\n"
    assert batches.jobs == [BatchJob("q.jsonl", "a.jsonl")]


def test_a_failed_row_is_named_and_exits_with_3(run, batches):
    batches.report = FAILED
    result = run("batch", "q.jsonl", "--out", "a.jsonl")
    assert result.code == 3
    assert "1,199 answered (3 not found), 1 failed; 61,000 tokens\n" in result.out
    assert "failed (usage): q7: k must be a whole number\n" in result.out
    shown = run("batch", "q.jsonl", "--out", "a.jsonl", "--json")
    assert shown.code == 3
    assert shown.json["failed"] == 1
    assert shown.json["failures"] == [{"id": "q7", "code": "usage", "message": "k must be a whole number"}]


def test_options_reach_the_settings_and_the_job(run, batches, world):
    run(
        "batch", "q.csv", "--out", "a.parquet", "--limit", "5", "--overwrite", "--filter", "year=2023", "--document",
        "d.pdf", "-k", "3", "--strategy", "blend", "--temperature", "0.5", "--engine", "ray", "--draft", "self",
        "--transfer", "--ratio", "0.3",
    )  # fmt: skip
    assert batches.jobs == [BatchJob("q.csv", "a.parquet", 5, True, {"year": "2023"}, "d.pdf", 0.3)]
    [config] = world.configs
    assert (config.retrieval.k, config.generation.strategy, config.generation.temperature) == (3, Strategy.BLEND, 0.5)
    assert config.jobs.engine is ExecutorName.RAY
    assert (config.draft.drafter, config.draft.mode) == ("self", DraftMode.TRANSFER)


def test_what_drafts_may_do_is_only_said_of_drafts(run):
    result = run("batch", "q.jsonl", "--out", "a.jsonl", "--exact")
    assert result.code == 2
    assert "say what drafts may do: name a drafter with --draft" in result.err


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("ids must differ"), 2), (StoreSpaceError("the disk is full"), 4)]
)
def test_an_error_is_one_line_and_its_exit_code(run, batches, error, code):
    batches.error = error
    result = run("batch", "q.jsonl", "--out", "a.jsonl")
    assert (result.code, result.out, result.err) == (code, "", f"error: {error}\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_job_save_and_says_how_to_go_on(run, batches, number, code):
    batches.report, batches.signal = replace(REPORT, answered=40, not_found=0, interrupted=True), number
    result = run("batch", "q.jsonl", "--out", "a.jsonl")
    assert result.code == code
    assert result.out == "40 answered of 1,200 rows; 61,000 tokens\n"
    assert "the same command goes on with the rest" in result.err


def test_a_dry_run_says_what_it_would_take(run, batches):
    result = run("batch", "q.jsonl", "--out", "a.jsonl", "--dry-run")
    assert (result.code, batches.jobs) == (0, [])
    assert result.out == (
        "1,200 rows, 1 of which cannot be asked\n"
        "about 2,000,000 prompt tokens, at most 300,000 new ones\n"
        "at most about 1:19:02 (h:m:s or m:s), loading models apart\n"
        "KV: 46.0 MB a running row, 2.1 GB of chunks kept\n"
    )
    assert "retrieval 20 ms a row, prefill 900 and decoding 120 tokens/s" in result.err
    assert run("batch", "q.jsonl", "--out", "a.jsonl", "--dry-run", "--json").json["dry_run"] is True


@pytest.mark.parametrize("arguments", [("batch", "q.jsonl"), ("batch", "--out", "a.jsonl")])
def test_questions_and_out_are_needed(run, arguments):
    assert run(*arguments).code == 2
