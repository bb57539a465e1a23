"""The folder of a job belongs to one process at a time, whatever others do at the same moment."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from ragkit.errors import StoreLockedError
from ragkit.jobs.job_folder import open_job_folder


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
