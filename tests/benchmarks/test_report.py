"""What the benchmarks share is right: their tables, intervals and records can be relied on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def report():
    spec = importlib.util.spec_from_file_location("benchmark_report", BENCHMARKS / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interval_of_a_clear_difference_leaves_out_zero(report):
    a = [1.0] * 60 + [0.0] * 40
    b = [1.0] * 40 + [0.0] * 60
    mean, low, high = report.paired_bootstrap(a, b)
    assert mean == pytest.approx(0.2)
    # The 20 differing pairs of 100 make a binomial share: 0.2 +- 1.96 * 0.04.
    assert low == pytest.approx(0.12, abs=0.015)
    assert high == pytest.approx(0.28, abs=0.015)


def test_the_interval_covers_the_true_mean_about_95_times_in_100(report):
    generator = np.random.default_rng(7)
    covered = 0
    for seed in range(200):
        a, b = generator.normal(0.3, 1, 80), generator.normal(0.0, 1, 80)
        _, low, high = report.paired_bootstrap(a, b, resamples=400, seed=seed)
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 198


def test_pairs_of_unequal_length_are_refused(report):
    with pytest.raises(ValueError, match="got 2 and 1"):
        report.paired_bootstrap([1.0, 2.0], [1.0])


def test_interleaved_runs_every_function_in_every_round_in_a_rotating_order(report):
    calls = []
    names = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    medians = report.interleaved(names, rounds=2, warmup=1)
    assert "".join(calls) == "abcbcacab"
    assert set(medians) == {"a", "b", "c"}


def test_tables_align_numbers_and_escape_bars(report):
    rows = [{"what": "a|b", "ms": 12.345, "n": 12345}, {"what": "c", "ms": 1234.5, "n": None}]
    assert report.markdown_table(rows, {"what": "What", "ms": "ms", "n": "n"}) == (
        "| What | ms | n |\n|---|---:|---:|\n| a\\|b | 12.3 | 12,345 |\n| c | 1,234 | - |"
    )


def test_a_record_names_machine_versions_commit_and_date(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path = report.write_result("speed", {"ms": 1.5})
    record = json.loads(path.read_text())
    assert path == tmp_path / "speed.json"
    assert record["result"] == {"ms": 1.5}
    assert record["machine"]["cores"] >= 1
    assert "python" in record["versions"]
    assert set(record) == {"benchmark", "date", "commit", "machine", "versions", "result"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["speed.json"]


def test_a_figure_that_is_no_number_is_not_recorded(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="Out of range float"):
        report.write_result("speed", {"ms": float("nan")})
    assert not (tmp_path / "speed.json").exists()
