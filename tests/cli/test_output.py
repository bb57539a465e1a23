"""Words on their way out: tables, sizes, control characters, JSON."""

from __future__ import annotations

import json

import pytest

from ragkit.cli.output import Output, human_bytes, one_line, printable, table


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_500_000, "4.5 MB"), (2e12, "2.0 TB")]
)
def test_sizes_read_well(count, text):
    assert human_bytes(count) == text


def test_control_characters_and_direction_overrides_do_not_reach_a_terminal():
    assert printable("a\x1b[31mb\x07\x9b\u202ec\td\n") == "a[31mbc\td\n"


def test_one_line_joins_and_cuts():
    assert one_line(" a\n\n b\tc ") == "a b c"
    assert one_line("abcdef", 4) == "abc…"


def test_a_table_without_rows_is_its_header():
    assert list(table(("A", "LONG"), [])) == ["A  LONG"]


def test_json_keeps_names_that_are_no_valid_text(capsys, monkeypatch):
    import sys

    sys.stdout.reconfigure(errors="backslashreplace")
    Output(json=True).result({"uri": "caf\udce9"}, ())
    assert json.loads(capsys.readouterr().out) == {"uri": "caf\udce9"}


def test_nothing_is_written_after_the_reader_has_gone(monkeypatch):
    class Closed:
        encoding = "utf-8"

        def __init__(self):
            self.writes = 0

        def isatty(self):
            return False

        def write(self, text):
            self.writes += 1
            raise BrokenPipeError

        def flush(self):
            pass

        def fileno(self):
            raise OSError

    closed = Closed()
    monkeypatch.setattr("sys.stdout", closed)
    output = Output()
    output.write("a")
    output.write("b")
    assert closed.writes == 1
    assert output.closed
