"""Results of measurements: written as a whole or not at all."""

import pytest

from ragkit.cli.measuring import write_results


def test_results_take_the_place_of_older_ones_and_leave_nothing_beside(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("older")
    write_results(out, "newer ✓\n")
    assert out.read_text(encoding="utf-8") == "newer ✓\n"
    assert list(tmp_path.glob(".tmp-*")) == []


def test_results_that_cannot_be_written_leave_the_older_ones(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("older")
    with pytest.raises(UnicodeEncodeError):
        write_results(out, "a" * 100_000 + "\ud800")
    assert out.read_text() == "older"
    assert list(tmp_path.glob(".tmp-*")) == []


def test_results_go_through_a_link_to_where_it_leads(tmp_path):
    (tmp_path / "kept.json").write_text("older")
    link = tmp_path / "out.json"
    link.symlink_to("kept.json")
    write_results(link, "newer")
    assert link.is_symlink()
    assert (tmp_path / "kept.json").read_text() == "newer"
