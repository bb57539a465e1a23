"""`ragkit ingest`: counts, failures, exit codes, and a stop that finishes the running commit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ragkit.reports import FailedSource, IngestReport, KVIngestReport, PageIngestReport

FAILED = FailedSource("/docs/locked.pdf", "parse", "encrypted", "/docs/locked.pdf: the file asks for a password")


def test_the_counts_are_printed(run):
    result = run("ingest", "docs")
    assert result.out == "2 added, 1 unchanged; 40 chunks, 9,000 tokens in 1.2 s\n"
    assert result.code == 0


def test_some_failures_exit_with_3_and_are_named(run, world):
    world.report = IngestReport(added=1, failed=(FAILED,), chunks=4, tokens=90, seconds=0.5)
    result = run("ingest", "docs")
    assert result.code == 3
    assert result.out.splitlines() == [
        "1 added, 1 failed; 4 chunks, 90 tokens in 0.5 s",
        "failed (encrypted): /docs/locked.pdf: the file asks for a password",
    ]


def test_the_json_has_the_keys_that_other_tools_rely_on(run, world):
    world.report = IngestReport(added=1, updated=2, removed=3, failed=(FAILED,), chunks=4, tokens=90, seconds=0.5)
    result = run("ingest", "docs", "--json")
    assert result.code == 3
    assert {key: result.json[key] for key in ("added", "updated", "unchanged", "removed", "chunks", "tokens")} == {
        "added": 1,
        "updated": 2,
        "unchanged": 0,
        "removed": 3,
        "chunks": 4,
        "tokens": 90,
    }
    assert result.json["seconds"] == 0.5
    assert result.json["failed"] == [
        {
            "uri": "/docs/locked.pdf",
            "stage": "parse",
            "code": "encrypted",
            "message": "/docs/locked.pdf: the file asks for a password",
        }
    ]


def test_a_dry_run_says_would_and_creates_no_store(run, world):
    world.store_exists = False
    world.report = IngestReport(added=3, relinked=1)
    assert run("ingest", "docs").out == "3 added, 1 renamed; 0 chunks, 0 tokens in 0.0 s\n"
    assert world.calls[-1][1]["dry_run"] is False
    assert run("ingest", "docs", "--dry-run").out == "would be: 3 added, 1 renamed\n"
    assert world.calls[-1][1]["dry_run"] is True


def test_every_option_reaches_the_pipeline(run, world):
    options = "--chunker sentence --max-tokens 99 --embedder e --lock-timeout 3 --prune --reembed --retry-failed"
    globs = "--include *.md --include *.txt --exclude old/**"
    run("ingest", "a", "b", *options.split(), *globs.split())
    config = world.configs[0]
    assert (config.chunking.chunker, config.chunking.max_tokens) == ("sentence", 99)
    assert config.embedding.model == "e"
    assert config.ingest.lock_timeout_s == 3.0
    assert (config.ingest.include, config.ingest.exclude) == (("*.md", "*.txt"), ("old/**",))
    assert world.calls == [
        (
            "ingest",
            {
                "sources": ["a", "b"],
                "prune": True,
                "reembed": True,
                "retry_failed": True,
                "dry_run": False,
                "pages": False,
            },
        )
    ]


def test_what_was_read_into_pages_is_said(run, world):
    world.report = IngestReport(unchanged=1, seconds=2.0, pages=PageIngestReport(1, 2, 1_000_000, 7_000_000_000))
    result = run("ingest", "docs", "--pages")
    assert result.out.splitlines()[1] == "1 documents read into pages (1,000,000 tokens, 7.0 GB), 2 there already"
    assert world.calls[-1][1]["pages"] is True


def test_the_kv_of_chunks_is_computed_on_request_and_counted(run, world):
    world.report = IngestReport(unchanged=1, chunks=0, seconds=2.0, kv=KVIngestReport(30, 10, 123_000_000))
    result = run("ingest", "--kv")
    assert world.configs[-1].ingest.kv is True
    assert result.out.splitlines()[1] == "KV of 30 chunks computed (123.0 MB), of 10 there already"
    assert run("ingest", "--kv", "--json").json["kv"] == {
        "computed": 30, "present": 10, "bytes": 123_000_000, "shared": 0, "left_out": 0,
    }  # fmt: skip
    run("ingest", "docs", "--no-kv")
    assert world.configs[-1].ingest.kv is False


def test_kv_that_found_no_room_is_partly_done(run, world):
    world.report = IngestReport(unchanged=1, kv=KVIngestReport(30, 10, 123_000_000, shared=5, left_out=2))
    result = run("ingest", "--kv")
    assert result.code == 3
    assert result.out.splitlines()[1].endswith("of 10 there already, 5 have the text of another")


def test_without_kv_none_is_reported(run):
    assert run("ingest", "docs", "--json").json["kv"] is None


def test_a_store_can_be_embedded_again_without_naming_its_sources(run, world):
    assert run("ingest", "--reembed").code == 0
    assert world.calls[0][1]["sources"] == []


def test_warnings_of_readers_reach_stderr(run, world):
    world.report = IngestReport(added=1, warnings=("a.txt: 3 bytes could not be decoded",))
    assert run("ingest", "a.txt").err == "warning: a.txt: 3 bytes could not be decoded\n"
    assert run("ingest", "a.txt", "-q").err == ""


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_running_commit(run, world, number, exit_code):
    seen = []

    def work(progress, stop):
        os.kill(os.getpid(), number)
        seen.append(stop.wait(5))

    world.on_ingest = work
    before = signal.getsignal(number)
    result = run("ingest", "docs", "--json")
    assert result.code == exit_code
    assert seen == [True]
    assert (result.json["interrupted"], result.json["added"]) == (True, 2)
    assert result.err.splitlines() == [
        "stopping after the running commit; once more stops at once",
        "stopped; everything counted is committed, and the same command goes on with the rest",
    ]
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once(run, world):
    def work(progress, stop):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did not stop the work")

    world.on_ingest = work
    result = run("ingest", "docs", "--json")
    assert result.code == 130
    assert result.json["error"]["code"] == "interrupted"


def test_a_signal_after_the_last_commit_changes_nothing(run, world):
    world.on_ingest = lambda progress, stop: None
    assert run("ingest", "docs").code == 0


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_signalled_exits_as_shells_expect(tmp_path: Path, number, exit_code):
    script = tmp_path / "wait.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time, types
            from ragkit.cli.app import main
            class Pipeline:
                @classmethod
                def open(cls, *_, **__):
                    print("ready", flush=True)
                    time.sleep(60)
            module = types.ModuleType("ragkit.pipeline")
            module.Pipeline = Pipeline
            sys.modules["ragkit.pipeline"] = module
            sys.exit(main(["search", "anything"]))
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert time.monotonic() - started < 10
    assert err == "error: stopped by a signal; nothing is half done, run the same command again\n"


def test_a_query_of_a_database_is_a_source(run, world):
    run("ingest", "docs", "--sql", "SELECT id, text FROM notes", "--sql-url", "sqlite:///notes.db")
    assert world.calls[0][1]["sources"] == ["docs", "sqlite:///notes.db?query=SELECT+id%2C+text+FROM+notes"]


def test_the_database_may_stand_in_the_environment(run, world, monkeypatch):
    monkeypatch.setenv("RAGKIT_SQL_URL", "postgresql://bob:hunter2@db/d")
    result = run("ingest", "--sql", "SELECT 1 AS text")
    assert world.calls[0][1]["sources"] == ["postgresql://bob:hunter2@db/d?query=SELECT+1+AS+text"]
    assert "hunter2" not in result.out + result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sql", "SELECT 1"), "name it with --sql-url URL, or in RAGKIT_SQL_URL"),
        (("--sql-url", "sqlite:///x"), "give both"),
        (("--sql", "SELECT 1", "--sql-url", "ftp://u:hunter2@h"), "'ftp://h' names no database"),
    ],
)
def test_half_a_database_is_refused(run, arguments, said):
    result = run("ingest", *arguments)
    assert result.code == 2
    assert said in result.err
    assert "hunter2" not in result.err
