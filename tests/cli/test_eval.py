"""`ragkit eval chunking`: from files to tables; the models are doubles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doubles import HashEmbedder, WordTokenizer
from question_folder import FROGS, write_question_folder

from ragkit.bench.cached_embedder import CachedEmbedder
from ragkit.bench.chunking_quality import EvaluationTools
from ragkit.chunking.characters import CharacterTokenizer

QUICK = ("--chunkers", "recursive,token", "--caps", "12")


@pytest.fixture(autouse=True)
def models(monkeypatch) -> None:
    def tools(config, cache, unit):
        if unit == "characters":
            return EvaluationTools(CharacterTokenizer(), CachedEmbedder(HashEmbedder(), cache), None, lambda: None)
        return EvaluationTools(WordTokenizer(), CachedEmbedder(HashEmbedder(), cache), None, lambda: None)

    monkeypatch.setattr("ragkit.cli.eval._tools", tools)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_question_folder(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def own(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "frogs.txt").write_text(FROGS)
    (tmp_path / "qa.jsonl").write_text('{"question": "Where do frogs live?", "answer": "in ponds"}\n')
    return str(tmp_path / "frogs.txt"), "--questions", str(tmp_path / "qa.jsonl")


def test_the_public_sets_that_the_folder_holds_are_measured(run, data):
    result = run("eval", "chunking", "--data", str(data), *QUICK, "--json")
    found = result.json
    assert result.code == 0
    assert [one["name"] for one in found["sets"]] == ["chunking_evaluation", "xquad", "code_search"]
    assert [(row["data"], row["chunker"], row["cap"]) for row in found["rows"]] == [
        (name, chunker, 12)
        for name in ("chunking_evaluation", "xquad", "code_search")
        for chunker in ("recursive", "token")
    ]
    assert set(found["rows"][1]["against_baseline"]) == {"dense", "bm25", "hybrid"}
    assert found["embedder"] == "hash@16"
    assert (found["interrupted"], found["chroma"]) == (False, [])
    assert {"cores", "cpu"} <= set(found["machine"])


def test_the_folder_comes_from_the_environment_as_well(run, data, monkeypatch):
    monkeypatch.setenv("RAGKIT_DATA", str(data))
    found = run("eval", "chunking", "--sets", "xquad", *QUICK, "--limit", "1", "--characters", "40", "--json").json
    assert found["sets"] == [
        {"name": "xquad", "documents": 1, "questions": 1, "characters": 40, "metric": "hit"},
    ]


def test_people_see_a_table_a_set(run, data):
    lines = run("eval", "chunking", "--data", str(data), "--sets", "xquad", *QUICK).out.splitlines()
    assert lines[0] == "xquad: % of answers whole in one piece within 800 retrieved characters"
    assert lines[1].split()[:3] == ["chunker", "cap", "chunks"]
    assert [line.split()[:2] for line in lines[2:4]] == [["recursive", "12"], ["token", "12"]]
    assert lines[1].split()[-4:] == ["dense,", "first", "chunk", "against"]
    assert lines[3].endswith("+0.0 [+0.0, +0.0]")


def test_caps_may_be_counted_in_characters(run, data):
    arguments = ("--data", str(data), "--sets", "xquad", "--chunkers", "recursive", "--unit", "characters", "--json")
    found = run("eval", "chunking", *arguments).json
    assert found["cap_unit"] == "characters"
    assert [row["cap"] for row in found["rows"]] == [200, 400, 800]
    assert [row["chunks"] for row in found["rows"]] == [2, 2, 2]  # one a document: each is shorter
    assert set(found["rows"][0]["first_chunk"]) == {"dense", "bm25", "hybrid"}


def test_own_documents_are_asked_own_questions(run, own):
    found = run("eval", "chunking", *own, *QUICK, "--json").json
    assert found["sets"] == [{"name": "qa", "documents": 1, "questions": 1, "characters": 800, "metric": "hit"}]
    assert [row["scores"]["dense"] for row in found["rows"]] == [100.0, 100.0]


def test_raw_numbers_and_the_frontier_are_written(run, own, tmp_path):
    raw, plot = tmp_path / "raw.json", tmp_path / "frontier.svg"
    assert run("eval", "chunking", *own, *QUICK, "--out", str(raw), "--plot", str(plot)).code == 0
    written = json.loads(raw.read_text())
    assert {point["mode"] for point in written["points"]} == {"dense", "bm25", "hybrid"}
    assert "answer whole in one piece, %" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to ask about"),
        (("--data", "gone"), "gone holds none of the question sets chunking_evaluation, xquad, code_search"),
        (("--data", "gone", "--sets", "xquad"), "gone holds no folder xquad"),
        (("a.txt",), "your own documents and --questions belong together"),
        (("--questions", "qa.jsonl"), "your own documents and --questions belong together"),
        (("--chunkers", "recursiv"), "did you mean 'recursive'?"),
        (("--data", ".", "--plot", "a.gif"), "give one of these endings, got 'a.gif'"),
        (("--data", ".", "--out", "gone/a.json"), "--out: gone/a.json is a folder, or lies in none"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(run, arguments, message):
    result = run("eval", "chunking", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@pytest.mark.parametrize("caps", ["0", "12,x", ""])
def test_caps_are_whole_numbers_from_one(run, own, caps):
    result = run("eval", "chunking", *own, "--caps", caps)
    assert result.code == 2
    assert "--caps takes whole numbers from 1 on, separated by commas" in result.err


@pytest.mark.parametrize("more", [("--data", "."), ("--sets", "xquad")])
def test_public_sets_beside_own_questions_are_refused(run, own, more):
    result = run("eval", "chunking", *own, *more, *QUICK)
    assert (result.code, result.out) == (2, "")
    assert "--data and --sets are for the public sets" in result.err


def test_questions_that_are_not_there_are_named(run, own):
    result = run("eval", "chunking", own[0], "--questions", "gone.jsonl", *QUICK)
    assert result.code == 2
    assert "cannot read 'gone.jsonl': No such file or directory" in result.err


def test_a_cache_that_cannot_be_made_is_refused_at_once(run, own):
    result = run("eval", "chunking", *own, "--cache", f"{own[0]}/cache", *QUICK)
    assert result.code == 2
    assert "cannot be made: Not a directory; name another" in result.err


def test_documents_that_are_retrieved_whole_are_remarked_on(run, own):
    assert f"and the documents have {len(FROGS)}: everything is found" in run("eval", "chunking", *own, *QUICK).err
    assert "everything is found" not in run("eval", "chunking", *own, *QUICK, "--characters", "20").err
