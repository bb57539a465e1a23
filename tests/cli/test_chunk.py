"""`ragkit chunk`: one file, cut by the real readers and chunkers; the tokenizer is a double."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles import WordTokenizer

from ragkit.chunking.registry import CHUNKERS, MODEL_CHUNKERS
from ragkit.cli.common import CHUNKER_NAMES

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


GUIDE = "# Frogs\n\nFrogs live in ponds. They eat flies.\n\n## Stars\n\nStars shine at night. The Sun is a star.\n"


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    path = tmp_path / "guide.md"
    path.write_text(GUIDE)
    return path


def test_each_boundary_has_its_kind_and_its_signal(run, guide):
    data = run("chunk", str(guide), "--chunker", "structural", "--max-tokens", "16", "--json").json
    assert [chunk["boundary"] for chunk in data["chunks"]] == [
        None,
        {"kind": "sentence", "signal": -30.0},
        {"kind": "heading", "signal": 5.0},
        {"kind": "sentence", "signal": -30.0},
    ]
    (signals,) = data["signals"]
    assert (signals["uri"], signals["measure"], signals["threshold"]) == (str(guide), "log-odds of a cut", 0.0)
    cuts = [offset for offset, cut in zip(signals["offsets"], signals["cut"], strict=True) if cut]
    assert cuts == [chunk["char_start"] for chunk in data["chunks"][1:]]


def test_a_chunker_without_a_signal_still_shows_the_kinds(run, guide):
    data = run("chunk", str(guide), "--max-tokens", "16", "--json").json
    assert [chunk["boundary"] for chunk in data["chunks"][1:]] == [
        {"kind": kind, "signal": None} for kind in ("sentence", "heading", "sentence")
    ]
    assert data["signals"] == []


def test_headings_stand_with_each_chunk(run, guide):
    data = run("chunk", str(guide), "--json", "--max-tokens", "16").json
    assert [chunk["metadata"] for chunk in data["chunks"]] == [
        {"heading_path": path} for path in ["Frogs"] * 2 + ["Frogs > Stars"] * 2
    ]
    assert " tokens  Frogs > Stars\n" in run("chunk", str(guide), "--max-tokens", "16").out


def test_statistics_say_how_long_the_chunks_are(run, guide):
    data = run("chunk", str(guide), "--json", "--max-tokens", "16").json
    counts = sorted(chunk["token_count"] for chunk in data["chunks"])
    spread = {"min": counts[0], "median": (counts[1] + counts[2]) / 2, "max": counts[3]}
    assert data["statistics"] == {"chunks": 4, "tokens": spread, "cap": 16, "over_cap": 0}
    last = run("chunk", str(guide), "--max-tokens", "16").out.splitlines()[-1]
    shown = f"tokens {counts[0]} / {spread['median']:g} / {counts[3]} (min / median / max)"
    assert last == f"4 chunks, {shown}, over the cap of 16: 0"


def test_people_see_the_boundaries_and_what_they_came_from(run, guide):
    lines = run("chunk", str(guide), "--chunker", "structural", "--max-tokens", "16").out.splitlines()
    assert [line.strip() for line in lines if "──" in line] == [
        "── sentence, log-odds -30.000",
        "── heading, log-odds 5.000",
        "── sentence, log-odds -30.000",
    ]
    assert lines[-2] == "signal: log-odds of a cut, threshold 0.000; 3 of 3 boundaries cut"


def test_the_signal_is_plotted_with_its_cuts(run, guide, tmp_path):
    path = tmp_path / "signal.svg"
    assert run("chunk", str(guide), "--chunker", "structural", "--max-tokens", "16", "--plot", str(path)).code == 0
    svg = path.read_text()
    assert svg.startswith("<?xml")
    for text in ("guide.md, structural", "log-odds of a cut", "place in the text, characters", ">cut<", ">threshold<"):
        assert text in svg


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plot", "a.gif"), "give one of these endings, got 'a.gif'"),
        (("--plot", "a.svg"), "the chunker 'recursive' goes by no signal that could be plotted"),
        (("--plot", "gone/a.svg"), "the folder gone of the plot does not exist"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_refused(run, guide, arguments, message):
    result = run("chunk", str(guide), *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_a_plot_of_several_documents_is_refused(run, tmp_path):
    (tmp_path / "rows.csv").write_text("text\none\ntwo\n")
    result = run("chunk", str(tmp_path / "rows.csv"), "--chunker", "balanced", "--plot", "a.svg")
    assert result.code == 2
    assert "--plot draws one document, and" in result.err


def test_without_matplotlib_the_extra_is_named(run, guide, monkeypatch):
    monkeypatch.setattr("ragkit.figures.find_spec", lambda name: None)
    result = run("chunk", str(guide), "--chunker", "balanced", "--plot", "a.svg")
    assert result.code == 1
    assert result.err.strip().endswith("install it with: pip install 'ragkit[plots]'")


def test_one_chunk_is_written_as_one(run, file):
    assert run("chunk", str(file)).out.splitlines()[-1].startswith("1 chunk, tokens ")


def test_a_text_without_boundaries_has_no_line_of_signals(run, file, tmp_path):
    (tmp_path / "one.txt").write_text("Frogs.")
    assert "signal:" not in run("chunk", str(tmp_path / "one.txt"), "--chunker", "structural").out
    assert "signal:" in run("chunk", str(file), "--chunker", "structural").out


@pytest.mark.parametrize("name", ["chunk", "ingest"])
def test_the_help_names_every_chunker(run, name):
    shown = set(CHUNKER_NAMES.split(", "))
    assert shown == {*CHUNKERS, *MODEL_CHUNKERS}
    words = run(name, "--help").out.replace(",", " ").replace(".", " ").split()
    assert shown <= set(words)


def test_an_empty_name_is_answered_with_the_default(run, file):
    assert "did you mean 'recursive'?" in run("chunk", str(file), "--chunker", "").err
