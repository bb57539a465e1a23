"""The pool: in order, ahead but not too far, and nothing stops it."""

from __future__ import annotations

import threading
import time

import pytest

from ragkit.errors import UsageError
from ragkit.readers import ReaderPool, ReadFailure, ReadLimits, discover
from ragkit.readers.reading import read_source


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_sources(make, workers):
    sources = [make(f"{n}.{kind}", f"<html>number {n}") for n in range(12) for kind in ("html", "txt")]
    with ReaderPool(workers) as pool:
        results = list(pool.map(sources))
    assert [result.source.uri for result in results] == [source.uri for source in sources]
    assert all(result.documents[0].text == f"number {n // 2}" for n, result in enumerate(results))


def test_failures_stand_in_line_and_stop_nothing(make, stub_command):
    words = ["good", "segfault", "good", "spin", "eat", "garbage", "good"]
    sources = [make(f"{n}.html", f"<html>{word}") for n, word in enumerate(words)]
    with ReaderPool(2, ReadLimits(timeout_s=2.0, memory_mb=256), command=stub_command) as pool:
        results = list(pool.map(sources))
    codes = [result.error.code if isinstance(result, ReadFailure) else "" for result in results]
    assert codes == ["", "crash", "", "timeout", "oom", "crash", ""]
    assert [result.source for result in results] == sources


def test_sources_are_drawn_only_as_far_ahead_as_is_read(make):
    sources = [make(f"{n}.txt", "text") for n in range(40)]
    drawn = []

    def drawing():
        for source in sources:
            drawn.append(source)
            yield source

    with ReaderPool(2) as pool:
        results = pool.map(drawing())
        next(results)
        assert len(drawn) <= 2 * 4 + 1
        assert len(list(results)) == 39


def test_large_files_are_read_one_at_a_time(make, monkeypatch):
    sources = [make(f"{n}.txt", "x" * 1000) for n in range(6)]
    running, most = [], []

    def counted(source, *args, **named):
        running.append(source)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(source)
        return read_source(source, *args, **named)

    monkeypatch.setattr("ragkit.readers.pool.read_source", counted)
    with ReaderPool(3, ahead_bytes=1500) as pool:
        assert len(list(pool.map(sources))) == 6
    assert max(most) == 1


def test_leaving_early_ends_the_processes_at_once(make, stub_command):
    sources = [make("a.html", "<html>good"), *(make(f"{n}.html", "<html>sleep") for n in range(4))]
    before = time.monotonic()
    with ReaderPool(2, ReadLimits(timeout_s=60), command=stub_command) as pool:
        next(pool.map(sources))
    assert time.monotonic() - before < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ragkit-reader")]


def test_a_folder_goes_straight_into_a_pool(make, tmp_path):
    make("a.txt", "one")
    make("sub/b.html", "<p>two")
    with ReaderPool() as pool:
        assert [result.documents[0].text for result in pool.map(discover([tmp_path]))] == ["one", "two"]


def test_a_pool_without_workers_is_refused():
    with pytest.raises(UsageError, match="at least one worker"):
        ReaderPool(0)
