"""`ragkit bench speculative` over a tiny generator: what it prints, writes and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ragkit.cli.app import main

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from tiny_generator import write_generator


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> str:
    return str(write_generator(tmp_path_factory.mktemp("model")))


@pytest.fixture
def items(tmp_path) -> Path:
    file = tmp_path / "items.json"
    words = ["the otters live by the river near the old mill", "the market is held in winter below the bridge"]
    ctxs = [{"text": text} for text in words]
    file.write_text(json.dumps([{"question": "Where do otters live?", "answers": ["river"], "ctxs": ctxs}] * 2))
    return file


@pytest.fixture
def bench(capsys, generator, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGKIT_GENERATION_DTYPE", "float32")

    def run(*arguments):
        quick = ("--rounds", "1", "--max-new-tokens", "12", "--tokens", "900", "--items", "2")
        common = ("--generator", generator, "--device", "cpu", "--store", str(tmp_path / "store"))
        code = main(["bench", "speculative", *common, *quick, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_every_drafter_has_a_row_beside_plain_decoding(bench, items):
    code, out, err = bench("--source", str(items), "--drafters", "lookup,self", "--transfer")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["drafter", "none", "lookup", "self", "self"]
    assert [line.split()[-1] for line in out.splitlines()[1:4]] == ["100%"] * 3  # the same tokens


def test_the_json_holds_rows_answers_and_the_machine(bench, items, tmp_path):
    out_file = tmp_path / "out.json"
    code, out, err = bench("--source", str(items), "--drafters", "lookup", "--json", "--out", str(out_file))
    assert code == 0
    data = json.loads(out)
    assert data == json.loads(out_file.read_text(encoding="utf-8"))
    assert [row["drafter"] for row in data["rows"]] == ["none", "lookup"]
    for answer in data["answers"]["lookup"]:
        assert answer["steps"] + answer["accepted"] == answer["tokens"]
    assert data["rows"][0]["speed"] == [1.0, 1.0, 1.0]
    assert data["machine"]
    assert str(out_file) in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--drafters", ","), "--drafters takes lookup, self or names of models"),
        (("--drafters", "none"), "--drafters takes lookup, self or names of models"),
        (("--source", "nowhere.json"), "nowhere.json holds no questions"),
        (("--source", "store"), "there is no store"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, options, message, monkeypatch):
    monkeypatch.delenv("RAGKIT_DATA", raising=False)
    code, _, err = bench(*options)
    assert code in (2, 4)
    assert message in err


def test_a_public_set_that_is_not_there_is_named(bench, monkeypatch):
    monkeypatch.delenv("RAGKIT_DATA", raising=False)
    code, _, err = bench("--source", "emma")
    assert code == 2
    assert "the folder emma of RAGKIT_DATA" in err
