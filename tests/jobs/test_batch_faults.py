"""Batches under faults: killed at random and at every write, disk full, stopped: nothing lost, nothing twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_world import questions, read_jsonl, write_jsonl, write_world

from ragkit.jobs.result_log import ResultLog
from ragkit.store.faults import CRASH_EXIT_CODE

SCRIPT = Path(__file__).parent.parent / "support" / "batch_script.py"
ROWS = 40

pytestmark = pytest.mark.crash


class Commands:
    """Runs `ragkit` in processes of their own."""

    def __init__(self, world: Path) -> None:
        self.world = world
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "RAGKIT_HOME": str(world / "home")}
        self._server = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(world)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environ,
        )  # fmt: skip
        self.output = world / "output.txt"

    def start(self, *arguments: str, **environ: str) -> int:
        request = {"arguments": list(arguments), "environ": environ, "output": str(self.output)}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def ended(self) -> int:
        return int(self._server.stdout.readline())

    def run(self, *arguments: str, **environ: str) -> int:
        self.start(*arguments, **environ)
        return self.ended()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(write_world(tmp_path_factory.mktemp("world")))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def expected(commands: Commands) -> dict[str, str]:
    """What an undisturbed run answers."""
    write_jsonl(commands.world / "q.jsonl", [*questions(ROWS), {"id": "poison", "question": "Where?", "k": -1}])
    out = commands.world / "undisturbed.jsonl"
    assert commands.run("batch", str(commands.world / "q.jsonl"), "--out", str(out)) == 3
    return answers(out)


def answers(path: Path) -> dict[str, str]:
    rows = read_jsonl(path)
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["answer"] if "answer" in row else row["error"]["code"] for row in rows}


def done_lines(out: Path) -> list[bytes]:
    """The whole lines of a job's log."""
    log = out.with_name(out.name + ".partial") / "results.log"
    content = log.read_bytes() if log.exists() else b""
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def wait_for_rows(out: Path, count: int, process: int) -> None:
    """Return when so many rows are done, or the process has ended."""
    while len(done_lines(out)) < count and Path(f"/proc/{process}").exists() and not out.exists():
        time.sleep(0.002)


def test_a_job_killed_25_times_loses_nothing_and_repeats_nothing(
    commands: Commands, expected: dict[str, str], tmp_path: Path
) -> None:
    chance = random.Random(7)
    kills = amid = jobs = 0
    while kills < 25:
        out = tmp_path / f"out{jobs}.jsonl"
        known: list[bytes] = []
        for _ in range(100):
            process = commands.start("batch", str(commands.world / "q.jsonl"), "--out", str(out), "--quiet")
            if kills < 25:
                wait_for_rows(out, len(known) + chance.randrange(6), process)
                time.sleep(chance.uniform(0.0, 0.03))
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(process, signal.SIGKILL)
            code = commands.ended()
            if code == 3:
                break
            assert code == -signal.SIGKILL, commands.output.read_text()
            kills += 1
            if out.exists():  # killed behind its last step, or between that and leaving the folder
                folder = out.with_name(out.name + ".partial")
                if folder.exists():  # without its manifest the job is over, and the folder only left to be removed
                    code = 3 if (folder / "job.json").exists() else 2
                    assert commands.run("batch", str(commands.world / "q.jsonl"), "--out", str(out)) == code
                break
            now = done_lines(out)
            assert now[: len(known)] == known, "an answer that was synced is gone"
            amid += 0 < len(known) < len(now) < ROWS
            known = now
        jobs += 1
        numbers = [line.split(b" ")[1] for line in known]
        assert len(set(numbers)) == len(numbers), "a row was answered twice"
        assert answers(out) == expected
        assert not out.with_name(out.name + ".partial").exists()
    assert amid >= 8, "most kills should find the job under way"


def test_a_crash_at_any_step_of_writing_is_gone_on_from(
    commands: Commands, expected: dict[str, str], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "few.jsonl", questions(3))
    crashes = 0
    for step in range(1, 60):
        out = tmp_path / f"out{step}.jsonl"
        code = commands.run("batch", str(tmp_path / "few.jsonl"), "--out", str(out), RAGKIT_CRASH_AT=str(step))
        if code == 0:
            break
        assert code == CRASH_EXIT_CODE
        crashes += 1
        if not out.exists() or out.with_name(out.name + ".partial").exists():
            assert commands.run("batch", str(tmp_path / "few.jsonl"), "--out", str(out)) == 0
        assert answers(out) == {name: text for name, text in expected.items() if name in ("q0", "q1", "q2")}
        assert not out.with_name(out.name + ".partial").exists()
    assert crashes >= 12


def test_a_full_disk_ends_with_4_and_the_same_command_goes_on(
    commands: Commands, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    code = commands.run("batch", str(commands.world / "q.jsonl"), "--out", str(out), RAGKIT_ENOSPC_AT="25")
    assert code == 4
    assert "the disk is full" in commands.output.read_text()
    done = len(done_lines(out))
    assert 0 < done < ROWS
    assert commands.run("batch", str(commands.world / "q.jsonl"), "--out", str(out), "--json") == 3
    report = json.loads(commands.output.read_text().splitlines()[-1])
    assert (report["resumed"], report["rows"], report["failed"]) == (done, ROWS + 1, 1)
    assert answers(out) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_saving(
    commands: Commands, expected: dict[str, str], tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out.jsonl"
    process = commands.start("batch", str(commands.world / "q.jsonl"), "--out", str(out))
    deadline = time.monotonic() + 60
    while not done_lines(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process, number)
    assert commands.ended() == code
    assert "the same command goes on" in commands.output.read_text()
    assert commands.run("batch", str(commands.world / "q.jsonl"), "--out", str(out)) == 3
    assert answers(out) == expected


def test_a_second_process_on_the_same_output_is_kept_out(commands: Commands, expected: dict[str, str], tmp_path: Path):
    import fcntl

    out = tmp_path / "out.jsonl"
    folder = out.with_name("out.jsonl.partial")
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        assert commands.run("batch", str(commands.world / "q.jsonl"), "--out", str(out)) == 4
    assert "process 4711 is working on" in commands.output.read_text()


def test_a_damaged_answer_in_the_log_is_asked_again_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "results.log"
    log = ResultLog(path, 4)
    for number in range(4):
        log.append([(number, b'{"id": "q%d"}' % number)])
    log.close()
    content = bytearray(path.read_bytes())
    content[content.index(b"q1")] ^= 1
    path.write_bytes(content + b"0000")  # and a torn line at the end
    log = ResultLog(path, 4)
    assert (log.done, 1 in log, 3 in log) == (3, False, True)
    log.append([(1, b"{}")])
    assert list(log.rows()) == [b'{"id": "q0"}', b"{}", b'{"id": "q2"}', b'{"id": "q3"}']
    log.close()
