"""The commands over a real store; only the models are doubles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from doubles import HashEmbedder, WordTokenizer

from ragkit.cli.app import main
from ragkit.pipeline import Pipeline
from ragkit.store import Store


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def open_with_doubles(self, settings, *, create=False):
        doubles = {"embedder": HashEmbedder(), "tokenizer": WordTokenizer()}
        return Pipeline.open(settings.store, settings.config, create=create, **doubles)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    monkeypatch.setattr("ragkit.cli.common.Session.open", open_with_doubles)
    return run


@pytest.fixture
def docs() -> Path:
    folder = Path("docs").absolute()
    folder.mkdir()
    (folder / "frogs.md").write_text("# Frogs\n\nFrogs live in ponds. They eat flies.\n")
    (folder / "stars.txt").write_text("Stars shine at night. The Sun is a star.\n" * 20)
    return folder


def test_a_folder_goes_in_is_listed_checked_and_taken_out(run, docs):
    assert run("ingest", "docs")[0] == 0
    assert run("ingest", "docs")[1].startswith("0 added, 2 unchanged; 0 chunks, 0 tokens in ")
    code, listed, _ = run("ls")
    assert (code, [line.split()[:2] for line in listed.splitlines()[1:]]) == (
        0,
        [[str(docs / "frogs.md"), "ok"], [str(docs / "stars.txt"), "ok"]],
    )
    assert run("status")[1].splitlines()[1] == "sources     2  (0 failed, 0 damaged)"
    assert run("verify")[0] == 0
    assert run("rm", "docs/frogs.md") == (0, f"removed {docs / 'frogs.md'}\n", "")
    assert run("gc")[0] == 0
    assert len(run("ls")[1].splitlines()) == 2


def test_one_bad_document_is_named_and_the_others_go_in(run, docs):
    (docs / "empty.txt").write_bytes(b"")
    code, out, _ = run("ingest", "docs")
    assert code == 3
    assert out.splitlines()[0].startswith("2 added, 1 failed; ")
    assert out.splitlines()[1] == f"failed (empty): {docs / 'empty.txt'}: the file is empty"


def test_a_dry_run_leaves_no_store_behind(run, docs):
    assert run("ingest", "docs", "--dry-run") == (0, "would be: 2 added\n", "")
    assert not Path(".ragkit").exists()


def test_a_source_that_is_not_there_is_wrong_usage(run):
    code, out, err = run("ingest", "gone.pdf")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "gone.pdf" in err


def test_a_source_that_the_store_does_not_know_is_wrong_usage(run, docs):
    run("ingest", "docs")
    code, _, err = run("rm", "gone.pdf")
    assert code == 2
    assert "gone.pdf" in err
    assert len(run("ls")[1].splitlines()) == 3


def test_a_locked_store_is_exit_code_4(run, docs):
    run("ingest", "docs")
    store = Store.open(Path(".ragkit"))
    with store.writer(lock_timeout_s=1.0):
        code, _, err = run("ingest", "docs", "--lock-timeout", "0")
    store.close()
    assert (code, err.count("\n")) == (4, 1)


def test_a_damaged_catalogue_is_exit_code_4(run, docs):
    run("ingest", "docs")
    for name in ("ragkit.db-wal", "ragkit.db-shm"):
        Path(".ragkit", name).unlink(missing_ok=True)
    Path(".ragkit/ragkit.db").write_bytes(b"\0" * 100_000)
    code, out, err = run("ls")
    assert (code, out, err.count("\n")) == (4, "", 1)


@pytest.mark.parametrize("chunker", ["recursive", "structural"])
def test_heading_path_and_table_header_come_through_to_the_hits(run, docs, chunker):
    rows = "".join(f"| newt{n} | {n} grams |\n" for n in range(20))
    (docs / "newts.md").write_text(f"# Newts\n\nIntro.\n\n## Weights\n\n| name | weight |\n|---|---|\n{rows}")
    assert run("ingest", "docs", "--chunker", chunker, "--max-tokens", "40")[0] == 0
    code, out, _ = run("search", "newt19 19 grams", "-k", "1", "--json")
    hit = json.loads(out)["hits"][0]
    assert code == 0
    assert "newt19" in hit["text"]
    assert hit["metadata"] == {"heading_path": "Newts > Weights", "table_header": "name | weight"}
    assert "  Newts > Weights\n" in run("search", "newt19 19 grams", "-k", "1")[1]
