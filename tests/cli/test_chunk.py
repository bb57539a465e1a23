"""`ragkit chunk`: one file, cut by the real readers and chunkers; the tokenizer is a double."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles import WordTokenizer

TEXT = "Frogs live in ponds. They eat flies.\r\n\r\nToads prefer gardens: café, 🐸. They hide by day.\n"


@pytest.fixture(autouse=True)
def words(monkeypatch) -> None:
    monkeypatch.setattr("ragkit.models.resolve", lambda name, *, offline=False: Path("/models") / name)
    monkeypatch.setattr("ragkit.models.tokenizer.ModelTokenizer", lambda folder: WordTokenizer())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "frogs.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.mark.parametrize("chunker", ["token", "sentence", "recursive"])
def test_chunks_are_exact_spans_of_the_file_under_the_cap(run, file, chunker):
    data = run("chunk", str(file), "--chunker", chunker, "--max-tokens", "8", "--json").json
    assert data["chunker"] == chunker
    assert len(data["chunks"]) >= 3
    for index, chunk in enumerate(data["chunks"]):
        assert chunk["index"] == index
        assert chunk["text"] == TEXT[chunk["char_start"] : chunk["char_stop"]]
        assert chunk["token_count"] <= 8
        assert (chunk["uri"], chunk["page"]) == (str(file), None)


def test_people_see_spans_and_excerpts(run, file):
    lines = run("chunk", str(file)).out.splitlines()
    assert lines[0].strip() == f"0 {file} [0:{len(TEXT)}] {len(WordTokenizer().encode(TEXT))} tokens"
    assert lines[1].strip().startswith("Frogs live in ponds. They eat flies. Toads")


def test_no_store_is_needed_or_made(run, file, world):
    run("chunk", str(file))
    assert world.stores == []
    assert not Path(".ragkit").exists()


def test_an_unknown_chunker_names_the_nearest(run, file):
    result = run("chunk", str(file), "--chunker", "sentense")
    assert result.code == 2
    assert "did you mean 'sentence'?" in result.err


def test_a_file_that_cannot_be_read_fails_with_its_reason(run, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    result = run("chunk", str(tmp_path / "empty.txt"), "--json")
    assert (result.code, result.json["error"]["code"]) == (1, "empty")
    assert run("chunk", str(tmp_path / "gone.txt")).code == 2
    assert run("chunk", str(tmp_path)).code == 2
