"""Progress: rates and time to go; bars on a terminal only."""

from __future__ import annotations

import sys

import pytest

from ragkit.cli.output import Output
from ragkit.cli.progress import BarProgress, Meter, PlainProgress, progress_for
from ragkit.progress import Silent


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("announced", "done", "shown"),
    [
        ((1200, 8_000_000), (300, 2_000_000, 50_000), "300/1,200 documents, 0.20 MB/s, 5,000 tokens/s, ETA 0:30"),
        # Before any document is committed the tokens show that it goes on.
        ((35, 600_000), (0, 0, 22_000), "0/35 documents, 22,000 tokens, 2,200 tokens/s"),
        (
            (40, 80_000_000, "chunks"),
            (10, 20_000_000, 2_000),
            "10/40 chunks, 20.0 MB of 80.0 MB, 2.00 MB/s, 200 tokens/s, ETA 0:30",
        ),
    ],
    ids=["documents", "nothing committed", "other units"],
)
def test_what_is_done_rates_and_time_to_go_are_shown(announced, done, shown):
    clock = Clock()
    meter = Meter(clock)
    meter.start(*announced)
    clock.now += 10
    meter.add(*done)
    assert str(meter) == shown


def test_hours_are_written_out():
    clock = Clock()
    meter = Meter(clock)
    meter.start(0, 100)
    clock.now += 40
    meter.add(0, 1, 0)
    assert str(meter).endswith("ETA 1:06:00")


def test_bytes_say_which_part_is_done():
    meter = Meter(Clock())
    meter.start(1200, 8_000_000)
    meter.add(300, 2_000_000, 50_000)
    assert meter.fraction == 0.25


def test_without_bytes_the_documents_count():
    meter = Meter(Clock())
    meter.start(4, 0)
    meter.add(1, 0, 0)
    assert meter.fraction == 0.25


def test_more_than_announced_is_not_more_than_all():
    meter = Meter(Clock())
    meter.start(1, 10)
    meter.add(1, 25, 0)
    assert meter.fraction == 1.0
    assert "ETA" not in str(meter)


def test_plain_progress_writes_a_line_every_few_seconds(capsys):
    clock = Clock()
    progress = PlainProgress(5.0, clock)
    progress.start(10, 1000)
    for _ in range(10):
        clock.now += 1.1
        progress.advance(documents=1, bytes=100)
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split()[0] for line in captured.err.splitlines()] == ["5/10", "10/10"]


def test_the_display_fits_the_stream(monkeypatch):
    assert isinstance(progress_for(Output()), PlainProgress)
    assert isinstance(progress_for(Output(quiet=True)), Silent)
    monkeypatch.setattr("ragkit.cli.progress.is_terminal", lambda stream: stream is sys.stderr)
    assert isinstance(progress_for(Output()), BarProgress)


def test_a_bar_draws_on_stderr_and_leaves_messages(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    progress = BarProgress()
    progress.start(2, 100)
    progress.advance(documents=1, bytes=50, tokens=10)
    progress.message("a.pdf: [broken]")
    progress.close()
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a.pdf: [broken]" in captured.err
    assert "1/2 documents" in captured.err


def test_rows_of_a_batch_come_with_their_rate_and_how_much_was_found():
    clock = Clock()
    meter = Meter(clock)
    meter.start(100, 0, "rows")
    clock.now += 10.0
    meter.add(20, 0, 1000, hits=30, misses=10)
    assert str(meter) == "20/100 rows, 2.0 rows/s, 100 tokens/s, 75% of chunk KV found, ETA 0:40"
