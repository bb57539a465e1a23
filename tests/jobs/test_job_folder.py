"""The folder of a job belongs to one process at a time, whatever others do at the same moment."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ragkit.errors import JobError, StoreLockedError, StoreSpaceError
from ragkit.jobs.job_folder import open_job_folder
from ragkit.jobs.result_log import ResultLog


def test_a_folder_that_is_taken_away_while_its_lock_is_opened_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    folder, flock = tmp_path / "a.jsonl.partial", fcntl.flock

    def finished_by_another(lock: int, how: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(folder)
        flock(lock, how)

    monkeypatch.setattr("fcntl.flock", finished_by_another)
    out = str(tmp_path / "a.jsonl")
    with open_job_folder(out), pytest.raises(StoreLockedError), open_job_folder(out):
        pass


def test_who_has_finished_leaves_the_folder_of_the_next_alone(tmp_path: Path) -> None:
    out = str(tmp_path / "a.jsonl")
    with open_job_folder(out) as first:
        first.publish(lambda path: path.write_bytes(b""))
        following = open_job_folder(out)
        following.__enter__()
    with pytest.raises(StoreLockedError), open_job_folder(out):
        pass
    following.__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def _enter(out: Path) -> None:
    with open_job_folder(str(out)):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/a.jsonl", "cannot be written: Not a directory: .*file/a.jsonl.partial; give an --out in a folder"),
        ("taken.jsonl", "cannot be written: File exists: .*taken.jsonl.partial; give an --out in a folder"),
        ("a" * 300 + ".jsonl", "cannot be written: File name too long"),
    ],
)
def test_a_place_that_takes_no_files_is_named_with_the_reason(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken.jsonl.partial").touch()
    with pytest.raises(JobError, match=message):
        _enter(tmp_path / name)


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up"), (errno.EFBIG, "ulimit -f")],
)
def test_no_room_for_rows_or_output_is_said_as_such(tmp_path: Path, number: int, message: str) -> None:
    def full(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    with open_job_folder(str(tmp_path / "a.jsonl")) as folder, pytest.raises(StoreSpaceError, match=message):
        folder.publish(full)


def test_a_log_that_may_not_grow_keeps_what_it_holds(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from ragkit.errors import StoreSpaceError
from ragkit.jobs.result_log import ResultLog
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
log = ResultLog(Path(sys.argv[1]), 2)
log.append([(0, b"0" * 60)])
try:
    log.append([(1, b"1" * 60)])
except StoreSpaceError as error:
    print(error)
"""
    path = tmp_path / "results.log"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert "files may not become larger here" in done.stdout
    assert (ResultLog(path, 2).done, path.stat().st_size) == (1, 72)
