"""A measurement of long documents that was ended goes on with what stands of it, and with nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from ragkit.bench.long_report import Outcome

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MACHINE = {"cpu": "x", "gpus": ["H100"], "cores": 2}
SETTINGS = {
    "generator": "/models/small.gguf", "seed": 0, "lengths": [8192], "processes": 2,
    "pages": {"codec": "int8", "memory_mb": 100},
}  # fmt: skip


@pytest.fixture
def earlier_answers(monkeypatch):
    spec = importlib.util.spec_from_file_location("earlier_answers", BENCHMARKS / "earlier_answers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module.earlier_answers


def outcome(strategy, index):
    return Outcome(strategy, "needle", 8192, index, 0, 0.5, 8000, "which?", ("7",), "7", 1.0, 1.0, 7900, 1.0, 0.1)


def written(folder, **changes):
    record = {
        "settings": SETTINGS, "machine": MACHINE, "commit": "second", "earlier_commits": ["first"], "seconds": 12.5,
        "outcomes": [asdict(outcome(*one)) for one in (("rag", 0), ("pages", 0), ("pages", 1))],
        "notes": ["full was not asked at 8,192 tokens", "rag gave up at 8,192 tokens: memory ended",
                  "30 of 33 documents were not answered"],
        "done": [[8192, "needle", 0]],
    } | changes  # fmt: skip
    path = folder / "pages_needle.json"
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}), encoding="utf-8")
    return path


def test_documents_that_everybody_answered_stand_and_the_others_are_asked_about_again(tmp_path, earlier_answers):
    before = earlier_answers(written(tmp_path), SETTINGS, MACHINE)
    assert before.done == [(8192, "needle", 0)]
    assert before.outcomes == [outcome("rag", 0), outcome("pages", 0)]
    assert before.notes == ["full was not asked at 8,192 tokens"]
    assert (before.seconds, before.commits) == (12.5, ["first", "second"])


def test_how_many_work_and_where_the_model_and_the_memory_are_may_change(tmp_path, earlier_answers):
    now = SETTINGS | {"generator": "/tmp/small.gguf", "processes": 8, "pages": {"codec": "int8", "memory_mb": 9}}
    assert earlier_answers(written(tmp_path), now, MACHINE | {"cores": 16}).done


@pytest.mark.parametrize(
    ("facts", "machine", "named"),
    [
        ({"seed": 1}, {}, r"seed \(0, now 1\)"),
        ({"pages": {"codec": "int4"}}, {}, r"pages.codec \(int8, now int4\)"),
        ({}, {"gpus": []}, r"gpus \(\['H100'\], now \[\]\)"),
    ],
)
def test_what_was_measured_otherwise_is_refused_by_name(tmp_path, earlier_answers, facts, machine, named):
    with pytest.raises(SystemExit, match=named):
        earlier_answers(written(tmp_path), SETTINGS | facts, MACHINE | machine)


@pytest.mark.parametrize("missing", ["settings", "machine", "commit", "outcomes", "done"])
def test_a_file_of_something_else_is_refused_in_a_line(tmp_path, earlier_answers, missing):
    with pytest.raises(SystemExit, match=r"is not of a run that can go on \(KeyError"):
        earlier_answers(written(tmp_path, **{missing: None}), SETTINGS, MACHINE)
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(SystemExit, match="is not of a run that can go on"):
        earlier_answers(tmp_path / "empty.json", SETTINGS, MACHINE)
    with pytest.raises(SystemExit, match="is not there"):
        earlier_answers(tmp_path / "none.json", SETTINGS, MACHINE)
