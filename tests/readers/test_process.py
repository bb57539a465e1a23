"""Parsers that loop, eat memory, crash or lie cost one document and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ragkit.errors import ReadError
from ragkit.readers import ReadLimits, read_source
from ragkit.readers.base import ParseContext
from ragkit.readers.media_type import MediaType
from ragkit.readers.process import CHILD_COMMAND, ParserProcess

QUICK = ReadLimits(timeout_s=0.7, memory_mb=512)
PATIENT = ReadLimits(timeout_s=30, memory_mb=512)


def pid_of(result):
    return int(result.documents[0].text.rsplit(" ", 1)[1])


def failure(make, stub, word, limits=PATIENT):
    with pytest.raises(ReadError) as caught:
        read_source(make(f"{word}.html", f"<html>{word}"), limits, process=stub)
    return caught.value


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("word", ["spin", "sleep"])
def test_a_parser_that_loops_or_hangs_is_a_timeout(make, stub, word):
    before = time.monotonic()
    error = failure(make, stub, word, QUICK)
    assert error.code == "timeout"
    assert "0.7 s" in str(error)
    assert time.monotonic() - before < 20


def test_a_parser_that_eats_memory_is_oom(make, stub):
    error = failure(make, stub, "eat", ReadLimits(timeout_s=30, memory_mb=200))
    assert error.code == "oom"
    assert "200 MB" in str(error)


SMALL_PARENT = """
import sys
from ragkit.errors import ReadError
from ragkit.readers import ReadLimits, discover, read_source
from ragkit.readers.process import ParserProcess
with ParserProcess(sys.argv[2:]) as process:
    try:
        read_source(next(discover([sys.argv[1]])), ReadLimits(timeout_s=30, memory_mb=700), process=process)
    except ReadError as error:
        print(error.code)
"""


def test_a_native_parser_that_aborts_for_want_of_memory_is_oom(make, stub_command):
    # In a process of its own: the kernel counts a child's peak from its parent's size on, and a whole test run is
    # larger than the limit.
    source = make("eat_native.html", "<html>eat_native")
    command = [sys.executable, "-P", "-c", SMALL_PARENT, str(source.path), *stub_command]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip() == "oom"


def test_ctrl_c_goes_to_the_parent_alone(make, stub):
    pid = pid_of(read_source(make("a.html", "<html>good"), PATIENT, process=stub))
    assert os.getsid(pid) != os.getsid(0)


@pytest.mark.parametrize(
    ("word", "sign"), [("segfault", "SIGSEGV"), ("abort", "SIGABRT"), ("exit", "status 7"), ("half_frame", "status 0")]
)
def test_a_parser_that_dies_is_a_crash_that_says_how(make, stub, word, sign):
    error = failure(make, stub, word)
    assert error.code == "crash"
    assert sign in str(error)


@pytest.mark.parametrize("word", ["garbage", "huge_frame", "deaf", "bad_pages", "bad_metadata"])
def test_a_parser_that_sends_nonsense_is_a_crash(make, stub, word):
    assert failure(make, stub, word).code == "crash"


@pytest.mark.parametrize("word", ["spin", "eat", "segfault", "garbage", "deaf"])
def test_the_document_after_a_failure_gets_a_fresh_process(make, stub, word):
    good = make("good.html", "<html>good")
    first = pid_of(read_source(good, PATIENT, process=stub))
    failure(make, stub, word, ReadLimits(timeout_s=1.5, memory_mb=256))
    second = pid_of(read_source(good, PATIENT, process=stub))
    assert first != second
    assert not is_running(first)


def test_documents_share_one_process(make, stub):
    pids = {pid_of(read_source(make(f"{n}.html", "<html>good"), PATIENT, process=stub)) for n in range(5)}
    assert len(pids) == 1


@pytest.mark.parametrize(("word", "code"), [("refuse", "encrypted"), ("stumble", "corrupt"), ("recurse", "corrupt")])
def test_an_error_of_the_parser_keeps_its_process(make, stub, word, code):
    good = make("good.html", "<html>good")
    before = pid_of(read_source(good, PATIENT, process=stub))
    assert failure(make, stub, word).code == code
    assert pid_of(read_source(good, PATIENT, process=stub)) == before


def test_what_a_parser_prints_does_not_reach_the_wire(make, stub):
    result = read_source(make("print.html", "<html>print"), PATIENT, process=stub)
    assert result.documents[0].text.startswith("print in process")


def test_a_parser_cannot_write_a_byte_to_a_file(make, stub, tmp_path):
    assert failure(make, stub, "write").code == "unreadable"
    assert (tmp_path / "write.written").stat().st_size == 0


def test_secrets_of_the_environment_do_not_reach_a_parser(make, monkeypatch, stub):
    monkeypatch.setenv("RAGKIT_TEST_TOKEN", "secret")
    names = read_source(make("e.html", "<html>environment"), PATIENT, process=stub).documents[0].text.split()
    assert "RAGKIT_TEST_TOKEN" not in names
    assert "PATH" in names


def test_a_parser_process_imports_nothing_heavy(make, stub):
    modules = set(read_source(make("m.html", "<html>modules"), PATIENT, process=stub).documents[0].text.split())
    assert modules.isdisjoint({"torch", "numpy", "transformers", "pyarrow", "lxml", "pypdfium2", "faiss", "sqlite3"})
    assert not any(name.split(".")[0] in ("chunking", "retrieval", "kvcache", "kernels", "cli") for name in modules)


def test_the_time_limit_of_a_table_is_between_two_documents(make, stub):
    result = read_source(make("rows.html", "<html>slow_rows"), ReadLimits(timeout_s=1.3), process=stub)
    assert len(result.documents) == 4


def test_a_process_that_has_parsed_its_share_is_replaced(make, stub, monkeypatch):
    monkeypatch.setattr("ragkit.readers.process._MAX_DOCUMENTS", 2)
    pids = [pid_of(read_source(make(f"{n}.html", "<html>good"), PATIENT, process=stub)) for n in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_closing_ends_the_process(make, stub):
    pid = pid_of(read_source(make("a.html", "<html>good"), PATIENT, process=stub))
    assert is_running(pid)
    stub.close()
    assert not is_running(pid)


def test_a_command_that_does_not_start_says_so(make):
    with ParserProcess((sys.executable, "-c", "raise SystemExit(3)")) as process, pytest.raises(ReadError) as caught:
        read_source(make("a.html", "<html>good"), PATIENT, process=process)
    assert caught.value.code == "crash"
    assert "status 3" in str(caught.value)


def test_a_process_starts_from_the_repository_root_without_shadowed_modules():
    root = Path(__file__).parent.parent.parent
    assert (root / "chunking").is_dir()
    script = (
        "import sys, subprocess\n"
        "from ragkit.readers.process import CHILD_COMMAND\n"
        "probe = 'import sys, ragkit.readers.child, ragkit.chunking;'\n"
        "probe += 'print(str() in sys.path, str.lower(\"CHUNKING\") in sys.modules)'\n"
        "print(subprocess.run([*CHILD_COMMAND[:-1], probe], capture_output=True, text=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_process_left_by_a_dead_parent_ends(make, tmp_path):
    source = make("a.html", "<p>text")
    script = (
        "import os, sys\n"
        "from ragkit.readers import discover, read_source\n"
        "from ragkit.readers.process import ParserProcess\n"
        "process = ParserProcess()\n"
        "read_source(next(discover([sys.argv[1]])), process=process)\n"
        "print(process._idle._popen.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(source.path)], capture_output=True, text=True, timeout=60
    )
    pid = int(done.stdout)
    for _ in range(100):
        if not is_running(pid):
            break
        time.sleep(0.05)
    assert not is_running(pid)


def test_the_command_keeps_the_current_folder_off_the_module_path():
    assert CHILD_COMMAND[:2] == (sys.executable, "-P")


def test_a_reader_that_is_left_half_way_does_not_disturb_the_next(make, stub):
    rows = make("rows.html", "<html>slow_rows")
    items = stub.parse(rows.path, MediaType.HTML, ParseContext())
    assert next(items).row == 1
    items.close()
    assert read_source(make("a.html", "<html>good"), process=stub).documents[0].text.startswith("good")


def test_a_large_parent_does_not_make_its_processes_look_worn_out(make, stub):
    ballast = bytearray(900 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    pids = {pid_of(read_source(make(f"{n}.html", "<html>good"), PATIENT, process=stub)) for n in range(3)}
    assert len(pids) == 1
    assert failure(make, stub, "segfault").code == "crash"


def test_a_closed_parser_process_starts_no_other(make, stub):
    stub.close()
    with pytest.raises(ReadError, match="given up"):
        read_source(make("a.html", "<html>good"), process=stub)
