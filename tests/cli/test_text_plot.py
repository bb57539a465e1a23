"""Bars as text."""

from __future__ import annotations

import io
import sys

import pytest

from ragkit.cli.text_plot import Bar, bars

ROWS = [Bar("512", "full", 80.0, "80"), Bar("512", "blend", 20.0, "20"), Bar("1,024", "full", 160.0, "160")]


@pytest.fixture(autouse=True)
def _utf8(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))


def test_bars_are_as_long_as_their_values():
    # 16 characters are left for a bar: 36 - group 5 - name 5 - text 3 - 7 between them
    assert [line.count("█") for line in bars(ROWS, 36)] == [8, 2, 0, 16]


def test_groups_are_named_once_and_stand_apart():
    lines = list(bars(ROWS, 36))
    assert [line.split()[:2] for line in lines] == [["512", "full"], ["blend", "██"], [], ["1,024", "full"]]


def test_no_line_is_longer_than_the_width():
    assert max(len(line) for line in bars(ROWS, 36)) == 36


def test_an_eighth_of_a_character_shows():
    [line] = bars([Bar("", "a", 1.0, "")], 30, largest=8 * 22)
    assert line.split()[-1] == "▏"


def test_values_below_zero_have_no_bar_and_those_above_the_largest_a_full_one():
    low, high = bars([Bar("a", "x", -3.0, "-3"), Bar("a", "y", 9.0, "9")], 40, largest=1.0)
    assert "█" not in low
    assert high.count("█") == 29


def test_where_blocks_cannot_be_shown_bars_are_plain(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert [line.count("#") for line in bars(ROWS, 36)] == [8, 2, 0, 16]


def test_nothing_is_no_lines():
    assert list(bars([], 40)) == []
