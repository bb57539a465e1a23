"""Ingest under faults: killed at every write and at random, disk full, two at once. Nothing half-done is visible."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ingest_script import CONFIG

from ragkit import Pipeline
from ragkit.errors import StoreMissingError
from ragkit.store.faults import CRASH_EXIT_CODE
from ragkit.store.staging import STAGED

SCRIPT = Path(__file__).parent.parent / "support" / "ingest_script.py"
WORDS = ["frog", "star", "pond", "night", "sun", "fly", "river", "stone", "tree", "wind"]


def run(store: Path, *sources: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(store), *map(str, sources)]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=120, check=False)


def write_folder(folder: Path, files: int, seed: int) -> None:
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for number in range(files):
        text = "\n\n".join(" ".join(rng.choices(WORDS, k=30)) + "." for _ in range(rng.randint(1, 5)))
        (folder / f"{number}.txt").write_text(text)


def visible(store: Path) -> dict[str, str]:
    """Every visible document by file name, after every stored byte was checked."""
    with Pipeline.open(store, CONFIG, create=False) as pipeline:
        assert pipeline.verify().problems == ()
        with pipeline.store.snapshot():
            return {
                Path(link.uri).name: pipeline.store.document(link.doc_id).text
                for record in pipeline.store.sources()
                for link in pipeline.store.source_documents(record.uri)
            }


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def check_old_or_new(store: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Each source is wholly in its old or its new state."""
    if not (store / "ragkit.db").exists():
        return
    now = visible(store)
    for name in old.keys() | new.keys() | now.keys():
        assert now.get(name) in (old.get(name), new.get(name)), name


@pytest.mark.crash
def test_a_crash_at_any_write_leaves_each_source_old_or_new_and_the_next_run_ends_as_undisturbed(
    tmp_path: Path,
) -> None:
    folder, base = tmp_path / "docs", tmp_path / "base"
    write_folder(folder, 5, seed=1)
    assert run(base, folder).returncode == 0
    old = contents(folder)
    for name in ("0.txt", "1.txt"):
        (folder / name).unlink()
    write_folder(folder, 4, seed=2)
    (folder / "4.txt").rename(folder / "renamed.txt")
    new = contents(folder)
    crashes = 0
    for step in range(1, 200):
        store = tmp_path / f"store{step}"
        subprocess.run(["cp", "-r", str(base), str(store)], check=True)
        ended = run(store, folder, RAGKIT_CRASH_AT=str(step))
        if ended.returncode == 0:
            break
        assert ended.returncode == CRASH_EXIT_CODE, ended.stderr
        crashes += 1
        check_old_or_new(store, old, new)
        assert run(store, folder).returncode == 0
        assert visible(store) == new
    assert crashes > 5, "the fault layer killed nothing"


def table_of(path: Path, rows: list[str]) -> list[str]:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return rows


def visible_rows(store: Path, table: Path) -> list[str]:
    """The rows of a table that are found, after every stored byte was checked."""
    with Pipeline.open(store, CONFIG, create=False) as pipeline:
        assert pipeline.verify().problems == ()
        with pipeline.store.snapshot():
            links = pipeline.store.source_documents(str(table))
            assert pipeline.store.counts().documents == len({link.doc_id for link in links})
            return [pipeline.store.document(link.doc_id).text for link in links]


@pytest.mark.crash
def test_a_crash_between_the_parts_of_a_table_shows_all_of_the_old_one_or_all_of_the_new_one(
    tmp_path: Path,
) -> None:
    table, base = tmp_path / "table.jsonl", tmp_path / "base"
    rows = [f"Row {number} is about newt{number}." for number in range(20)]
    old = table_of(table, rows[:9])
    assert run(base, table).returncode == 0
    new = table_of(table, [f"{row} Now." if number % 3 == 0 else row for number, row in enumerate(rows)])
    crashes = between = 0
    for step in range(1, 100):
        store = tmp_path / f"store{step}"
        subprocess.run(["cp", "-r", str(base), str(store)], check=True)
        ended = run(store, table, RAGKIT_CRASH_AT=str(step))
        if ended.returncode == 0:
            break
        assert ended.returncode == CRASH_EXIT_CODE, ended.stderr
        crashes += 1
        now = visible_rows(store, table)
        assert now in (old, new)
        between += now == old and (store / STAGED).exists()
        assert run(store, table).returncode == 0
        assert visible_rows(store, table) == new
        assert not (store / STAGED).exists()
    assert crashes > 8
    assert between > 4, "it was never killed between two parts"


@pytest.mark.crash
def test_random_kills_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    folder, store = tmp_path / "docs", tmp_path / "store0"
    write_folder(folder, 40, seed=3)
    new = contents(folder)
    started = time.perf_counter()
    assert run(tmp_path / "undisturbed", folder).returncode == 0
    span = time.perf_counter() - started
    rng, kept, killed = random.Random(11), set[str](), 0
    for turn in range(1, 26):
        command = [sys.executable, str(SCRIPT), str(store), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 1.0) * span)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
        else:  # it ended before: the machine is faster now than it was
            span *= 0.8
        try:
            now = visible(store)
        except StoreMissingError:  # killed before or while the store was made
            now = {}
        assert now.items() <= new.items()
        assert kept <= now.keys(), "a committed source is gone"
        kept = set(now)
        if now == new and turn < 25:  # nothing is left to be killed at
            store, kept = tmp_path / f"store{turn}", set()
    assert killed >= 5
    assert run(store, folder).returncode == 0
    assert visible(store) == new


def test_a_full_disk_ends_with_exit_4_and_the_next_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    write_folder(folder, 3, seed=4)
    full = undisturbed = 0
    for step in range(1, 60):
        store = tmp_path / f"store{step}"
        ended = run(store, folder, RAGKIT_ENOSPC_AT=str(step))
        if ended.returncode == 0:  # a step that needs no room (the lock's note), or past the last one
            undisturbed += 1
            if undisturbed > 4:
                break
            continue
        full += 1
        assert ended.returncode == 4, ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
        check_old_or_new(store, {}, contents(folder))
        assert run(store, folder).returncode == 0
        assert visible(store) == contents(folder)
    assert full > 2, "the fault layer refused nothing"


def test_four_ingests_at_once_neither_lose_nor_repeat_a_document(tmp_path: Path) -> None:
    folders, store = [tmp_path / f"docs{number}" for number in range(4)], tmp_path / "store"
    for number, folder in enumerate(folders):
        folder.mkdir()
        for file in range(6):
            (folder / f"{number}-{file}.txt").write_text(f"Document {number} {file} about a {WORDS[file]}. " * 9)
    shared = tmp_path / "shared.txt"
    shared.write_text("Everybody ingests this one. " * 9)
    command = [sys.executable, str(SCRIPT), str(store)]
    processes = [
        subprocess.Popen([*command, str(folder), str(shared)], stdout=subprocess.PIPE, text=True) for folder in folders
    ]
    reports = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert sum(report["added"] for report in reports) == 25
    expected = {path.name: path.read_text() for folder in folders for path in folder.iterdir()}
    assert visible(store) == expected | {"shared.txt": shared.read_text()}
    with Pipeline.open(store, CONFIG, create=False) as pipeline:
        stored = pipeline.store.chunks(pipeline.store.row_ids())
        digests = [hashlib.sha256(one.chunk.chunk_id.encode()).digest() for one in stored]
        assert len(set(digests)) == len(digests)


def test_a_query_during_an_ingest_sees_the_last_commit(tmp_path: Path) -> None:
    folder, store = tmp_path / "docs", tmp_path / "store"
    write_folder(folder, 3, seed=5)
    assert run(store, folder).returncode == 0
    before = contents(folder)
    with Pipeline.open(store, CONFIG, create=False) as pipeline, pipeline.store.writer(lock_timeout_s=1):
        assert visible(store) == before


def test_a_catalogue_that_cannot_be_opened_is_still_verified(tmp_path: Path) -> None:
    folder, store = tmp_path / "docs", tmp_path / "store"
    write_folder(folder, 2, seed=6)
    assert run(store, folder).returncode == 0
    (store / "ragkit.db").write_bytes(b"rotten" * 100)
    with Pipeline.open(store, CONFIG, create=False) as pipeline:
        assert pipeline.verify().problems
