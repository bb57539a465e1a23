"""Plots are written the same every time, and what stands in their way is said before anything is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragkit import figures
from ragkit.errors import MissingExtraError, UsageError


def draw(path: Path) -> bytes:
    figure = figures.new_figure()
    figure.add_subplot().plot([0, 1, 4], label="recall")
    figures.save_figure(figure, path)
    return path.read_bytes()


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF")])
def test_the_ending_says_the_format_and_equal_figures_give_equal_files(tmp_path, name, start):
    first = draw(tmp_path / name)
    assert first.startswith(start)
    assert draw(tmp_path / f"again-{name}") == first


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"written as \.svg, \.png, \.pdf; .* got 'plot.gif'"):
        figures.check_figure_path(tmp_path / "plot.gif")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone of the plot does not exist"):
        figures.check_figure_path(tmp_path / "gone" / "plot.svg")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ragkit\[plots\]'$"):
        figures.check_figure_path(tmp_path / "plot.svg")


def test_a_file_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "plot.svg").mkdir()
    with pytest.raises(UsageError, match=r"cannot be written to .*plot\.svg: Is a directory"):
        draw(tmp_path / "plot.svg")
