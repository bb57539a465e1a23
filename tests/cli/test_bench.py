"""`ragkit bench blend` over a tiny generator: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from blended_pipeline import CONFIG, write_documents
from doubles import HashEmbedder
from tiny_generator import write_generator

from ragkit.bench.blend_speed import BlendSpeed
from ragkit.cli.app import main
from ragkit.cli.signals import Interrupted
from ragkit.pipeline import Pipeline

QUICK = ("--lengths", "500,900", "--rounds", "1", "--items", "2", "--ratios", "0.1,0.3", "-q")


@pytest.fixture(scope="session")
def generator(tmp_path_factory) -> str:
    return str(write_generator(tmp_path_factory.mktemp("generator")))


@pytest.fixture
def store(generator, tmp_path) -> str:
    folder = tmp_path / "store"
    with Pipeline.open(folder, CONFIG, embedder=HashEmbedder(), tokenizer=_tokenizer(generator)) as pipeline:
        pipeline.ingest([write_documents(tmp_path / "docs", range(6))])
    return str(folder)


@pytest.fixture
def bench(monkeypatch, capsys, generator) -> Callable[..., tuple[int, str, str]]:
    """Run `ragkit bench blend` with the tiny generator and an embedder without weights."""

    monkeypatch.setenv("RAGKIT_GENERATION_DTYPE", "float32")

    def open_with_double(self, settings, *, create=False):
        return Pipeline.open(settings.store, settings.config, create=create, embedder=HashEmbedder())

    monkeypatch.setattr("ragkit.cli.common.Session.open", open_with_double)
    monkeypatch.setattr("ragkit.bench.blend_prompts._LEAST_WORDS", 6)  # the tiny collection's sentences are short

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["bench", "blend", "--generator", generator, "--device", "cpu", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def _tokenizer(generator: str):
    from ragkit.models.tokenizer import ModelTokenizer

    return ModelTokenizer(Path(generator))


def test_over_a_store_both_parts_are_measured_and_shown(bench, store):
    code, out, err = bench("--store", store, *QUICK)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert any(line.startswith("ms from the chunks' ids to the first logits, one round; ") for line in lines)
    assert sum(bool(re.search("blend 10% +memory", line)) for line in lines) == 2
    assert any("2 prompts of " in line and "the collection's chunks" in line for line in lines)
    assert sum(line.lstrip().startswith("question") for line in lines) == 3  # two rows and the plot
    assert "█" in out
    assert "In short" not in out  # the configured ratio was not among those measured
    assert all(len(line) <= 100 for line in lines if not line.startswith(("ms ", "Recomputing")))


def test_settings_that_are_not_measured_are_named(bench, store, monkeypatch):
    monkeypatch.setenv("RAGKIT_BLEND_ROWS", "shared")
    monkeypatch.setenv("RAGKIT_BLEND_RATIO", "auto")
    code, out, _ = bench("--store", store, *QUICK, "--only", "speed", "--json")
    assert code == 0
    assert json.loads(out)["notes"] == [
        "blend.rows is shared, but only private rows are measured here",
        "blend.ratio is auto, but only fixed ratios are measured here",
    ]


def test_the_json_holds_raw_numbers_machine_and_versions(bench, store):
    code, out, _ = bench("--store", store, *QUICK, "--json")
    data = json.loads(out)
    assert code == 0
    assert set(data) == {
        "benchmark", "date", "model", "settings", "speed", "check", "quality", "distances", "quality_from",
        "quality_tokens", "notes", "seconds", "interrupted", "plots", "machine", "versions",
    }  # fmt: skip
    assert {row["prefill"] for row in data["speed"]} == {"full", "blend"}
    assert {row["kv_from"] for row in data["speed"]} == {None, "memory", "computed"}
    assert all(len(row["samples_ms"]) == 1 and row["first_logits_ms"] > 0 for row in data["speed"])
    assert [row["variant"] for row in data["quality"]] == ["reuse @ 0", "question @ 0.1", "question @ 0.3"]
    assert data["quality"][0]["recovered_mean"]["value"] == 0
    assert len(data["distances"]) == 2
    assert data["check"]["gap"] < 1e-4
    assert (data["quality_from"], data["interrupted"], data["plots"]) == ("collection", False, [])
    assert data["versions"]["torch"]
    assert data["machine"]["cores"] >= 1


def test_without_a_store_random_prompts_are_timed_and_quality_is_left_out(bench):
    code, out, _ = bench(*QUICK)
    assert code == 0
    assert "prompts of random tokens" in out
    assert "How near" not in out
    assert "note: quality is measured over a store's chunks or MuSiQue's" in out


def test_what_the_configured_ratio_gives_is_said_in_short(bench, store):
    _, out, _ = bench("--store", store, *QUICK, "--ratios", "0.15")
    said = " ".join(out[out.index("In short: ") :].split())
    assert re.match(
        r"In short: at the configured ratio of 15% the first logits come \d+\.\d times (sooner|later) than full "
        r"prefill's at \d\d\d tokens, from memory, and -?\d+% of the first token's KL is recovered\.",
        said,
    )


def test_a_ratio_that_each_question_finds_is_no_figure_in_short(bench, store, monkeypatch):
    monkeypatch.setenv("RAGKIT_BLEND_RATIO", "auto")
    code, out, err = bench("--store", store, *QUICK)
    assert (code, err) == (0, "")
    assert "blend 10%" in out
    assert "In short" not in out


def test_one_part_alone_is_measured(bench, store):
    assert "How soon" not in bench("--store", store, *QUICK, "--only", "quality")[1]
    assert "How near" not in bench("--store", store, *QUICK, "--only", "speed")[1]


def test_several_selectors_are_compared(bench, store):
    _, out, _ = bench("--store", store, *QUICK, "--only", "quality", "--selectors", "first,random", "--json")
    variants = [row["variant"] for row in json.loads(out)["quality"]]
    assert variants == ["reuse @ 0", "first @ 0.1", "first @ 0.3", "random @ 0.1", "random @ 0.3"]


def test_the_users_questions_are_asked_of_the_collection(bench, store):
    Path("questions.txt").write_text("Where do the otters live?\n\nWhat does the miller grind?\n")
    code, out, _ = bench("--store", store, *QUICK, "--only", "quality", "--questions", "questions.txt", "--json")
    data = json.loads(out)
    assert (code, len(data["distances"])) == (0, 2)
    assert data["quality"][0]["nll"] is None


def test_musique_is_taken_where_the_data_has_it(bench, monkeypatch):
    passages = [{"text": f"The otter of river {number} lives by a bridge."} for number in range(3)]
    items = [{"question": "Where does it live?", "answers": ["by a bridge"], "ctxs": passages}] * 2
    Path("musique").mkdir()
    Path("musique/musique_s.json").write_text(json.dumps(items))
    monkeypatch.setenv("RAGKIT_DATA", str(Path.cwd()))
    code, out, _ = bench(*QUICK, "--only", "quality", "--json")
    data = json.loads(out)
    assert (code, data["quality_from"], len(data["distances"])) == (0, "musique", 2)
    assert data["quality"][0]["nll"] > 0


def test_plots_are_svg_and_the_numbers_a_file(bench, store):
    code, out, _ = bench("--store", store, *QUICK, "--plot", "plots", "--out", "raw.json", "--json")
    written = [Path(name) for name in json.loads(out)["plots"]]
    assert code == 0
    assert written == [Path("plots/first_logits_by_length.svg"), Path("plots/recovered_by_budget.svg")]
    for path in written:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"tokens of the prompt", "chunk tokens recomputed, %"} & texts
    assert json.loads(Path("raw.json").read_text()) == json.loads(out)


def test_without_matplotlib_a_plot_fails_at_once_naming_the_extra(bench, monkeypatch):
    monkeypatch.setattr("ragkit.figures.find_spec", lambda name: None)
    code, out, err = bench("--plot", "plots")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "pip install 'ragkit[plots]'" in err


def test_ctrl_c_shows_what_is_done_and_ends_with_130(bench, store, monkeypatch):
    measure, calls = BlendSpeed.measure, []

    def stopped_in_the_second(self, *arguments):
        if calls:
            raise Interrupted(2)
        calls.append(1)
        return measure(self, *arguments)

    monkeypatch.setattr(BlendSpeed, "measure", stopped_in_the_second)
    code, out, err = bench("--store", store, *QUICK, "--json")
    data = json.loads(out)
    assert (code, err, data["interrupted"]) == (130, "", True)
    assert len({row["tokens"] for row in data["speed"]}) == 1
    assert data["quality"] == []
    assert data["notes"] == ["stopped before the end: what is shown was done by then"]


def test_a_time_limit_leaves_out_the_rest_and_says_so(bench, store):
    code, out, _ = bench("--store", store, *QUICK, "--time-limit", "0", "--json")
    data = json.loads(out)
    assert code == 0
    assert len({row["tokens"] for row in data["speed"]}) == 1
    assert len(data["distances"]) == 1
    assert [note.split(" left out ")[0] for note in data["notes"]] == ["the time limit"] * 2
    assert data["notes"][0].startswith("the time limit left out prompts of ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratios", "1.5"), "ratios must lie above 0 and up to 1, got 1.5"),
        (("--ratios", "0"), "ratios must lie above 0 and up to 1, got 0"),
        (("--ratios", "a few"), "--ratios takes numbers, separated by commas, got 'a few'"),
        (("--lengths", "1024,"), "--lengths takes whole numbers, separated by commas, got '1024,'"),
        (("--lengths", "9000"), "a length of 9,000 tokens is impossible: the model takes 1 to 4,096"),
        (("--lengths", "20"), "a prompt of 20 tokens has no room for chunks"),
        (("--selectors", "best"), "--selectors takes some of random, first, "),
        (("--selectors", "everything"), "no budget goes to the selector everything; take some of random, "),
        (("--questions", "empty.txt"), "--questions: empty.txt holds no question; write one a line"),
        (("--questions", "gone.txt"), "--questions: gone.txt cannot be read as UTF-8 text: "),
        (("--only", "quality"), "quality is measured over a store's chunks or MuSiQue's: "),
        (("--prompts", "musique"), "--prompts musique needs RAGKIT_DATA: "),
        (("--out", "nowhere/raw.json"), "--out: nowhere/raw.json is a folder, or lies in none"),
        (("--plot", "empty.txt"), "the folder empty.txt of the plots cannot be made: "),
    ],
)
def test_bad_input_is_one_line_and_wrong_usage(bench, arguments, message):
    Path("empty.txt").write_text("\n  \n")
    code, out, err = bench(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize("arguments", [("--store", "gone"), ("--prompts", "collection"), ("--questions", "one.txt")])
def test_a_store_that_was_asked_for_and_is_not_there_is_an_error(bench, arguments):
    Path("one.txt").write_text("Where?\n")
    code, out, err = bench(*arguments)
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert "there is no store in" in err


def test_a_model_that_is_not_there_is_an_error(bench):
    code, out, err = bench("--generator", "no/such/model", "--offline")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "no/such/model" in err
