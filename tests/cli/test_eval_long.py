"""`ragkit eval needle` and `ragkit eval ruler`: from options to tables; what answers is a double."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles import WordTokenizer

from ragkit.bench.long_answers import LongAnswer
from ragkit.cli.eval_long import LongTools
from ragkit.cli.heat_map import heat_map
from ragkit.cli.signals import Interrupted

NEEDLE = ("eval", "needle", "--lengths", "1000,2000", "--depths", "3", "--needles", "2", "-q")
RULER = ("eval", "ruler", "--tasks", "vt,kv_retrieval", "--lengths", "2000", "--items", "2", "-q")


class Reader:
    """Answers what stands in the first half of a document; the `after`th document stops everything."""

    def __init__(self, name: str, most_tokens: int = 0) -> None:
        self.name = name
        self.most_tokens = most_tokens
        self.stop_after = -1

    def answer(self, document, questions, max_new_tokens) -> Iterator[LongAnswer]:
        if self.stop_after == 0:
            raise Interrupted(2)
        self.stop_after -= 1
        half = len(document) // 2
        for question in questions:
            said = [document[start:stop] for start, stop in question.gold if stop <= half]
            yield LongAnswer(" ".join(said), ((0, half),), 10, 1.0, 0.5)


@pytest.fixture(autouse=True)
def readers(monkeypatch) -> dict[str, Reader]:
    made = {"full": Reader("full", most_tokens=1500), "rag": Reader("rag"), "pages": Reader("pages")}

    def tools(config, strategies, variants):
        made["full"].variants = variants
        made["full"].model = config.generation.model
        return LongTools([made[name] for name in strategies], WordTokenizer(), 20, on_gpu=False)

    monkeypatch.setattr("ragkit.cli.eval_long.long_tools", tools)
    return made


def test_needle_shows_a_heat_map_a_strategy_and_a_table(run):
    result = run(*NEEDLE)
    lines = result.out.splitlines()
    assert (result.code, result.err) == (0, "")
    assert lines[0] == "full: score in percent by depth and tokens"
    assert lines[1].split() == ["depth", "1,000", "2,000"]
    assert lines[2].split() == ["0%", "███", "100"]
    assert lines[4].split() == ["100%", "0"]
    rag = lines.index("rag: score in percent by depth and tokens")
    assert lines[rag + 2].split() == ["0%", "███", "100", "███", "100"]
    table = lines[rag + 7 :]
    assert "against full" in table[0]
    assert [line.split()[:4] for line in table[1:4]] == [
        ["full", "needle", "1,000", "6"],
        ["rag", "needle", "1,000", "6"],
        ["rag", "needle", "2,000", "6"],
    ]
    assert " ".join(table[4:]) == (
        "note: full was not asked at 2,000 tokens: it takes 1,500 at most, the model's window"
    )


def test_the_json_holds_every_answer_the_means_machine_and_versions(run):
    data = run(*NEEDLE, "--json").json
    assert set(data) == {
        "evaluation", "date", "rows", "cells", "outcomes", "notes", "settings", "seconds", "interrupted", "plots",
        "machine", "versions",
    }  # fmt: skip
    assert (data["evaluation"], data["interrupted"], data["plots"]) == ("needle", False, [])
    assert len(data["outcomes"]) == 18
    assert data["settings"] == data["settings"] | {
        "lengths": [1000, 2000], "strategies": ["full", "rag"], "depths": 3, "needles": 2, "together": False,
        "seed": 0, "texts": "made", "k": 8,
    }  # fmt: skip
    assert {(cell["row"], cell["score"]) for cell in data["cells"]} >= {("0%", 100.0), ("100%", 0.0)}


def test_needles_together_are_asked_of_one_document_a_round(run):
    data = run(*NEEDLE, "--together", "--json").json
    assert {(one["index"], one["number"]) for one in data["outcomes"]} == {(a, b) for a in (0, 1) for b in (0, 1, 2)}


def test_ruler_has_a_row_a_task_and_their_mean(run):
    data = run(*RULER, "--questions", "3", "--strategies", "rag", "--json").json
    assert [(row["task"], row["questions"]) for row in data["rows"]] == [
        ("vt", 2), ("kv_retrieval", 6), ("mean of tasks", 8),
    ]  # fmt: skip
    assert data["settings"]["tasks"] == ["vt", "kv_retrieval"]
    lines = run(*RULER, "--strategies", "rag").out.splitlines()
    assert not any("against" in line for line in lines)
    assert lines[1].split() == ["task", "2,000"]
    assert [line.split()[0] for line in lines[2:4]] == ["vt", "kv_retrieval"]


def test_equal_seeds_ask_the_same_and_other_seeds_other_things(run):
    asked = [
        [one["question"] for one in run(*RULER, "--strategies", "rag", "--seed", seed, "--json").json["outcomes"]]
        for seed in ("3", "3", "4")
    ]
    assert asked[0] == asked[1]
    assert not set(asked[0]) & set(asked[2])


def test_generator_and_k_reach_the_settings(run, readers):
    data = run(*RULER, "--generator", "other", "-k", "16", "--strategies", "rag,full", "--json").json
    assert (data["settings"]["generator"], data["settings"]["k"], readers["full"].model) == ("other", 16, "other")
    assert data["settings"]["strategies"] == ["rag", "full"]


def test_selectors_and_budgets_reach_the_answerers_and_the_settings(run, readers):
    chosen = ("--strategies", "full,pages", "--selectors", "mean-key,window", "--budgets", "64,128", "--own-prefill")
    data = run(*RULER, *chosen, "--json").json
    wanted = {"selectors": ["mean-key", "window"], "budgets": [64, 128], "own_prefill": True}
    assert {name: data["settings"][name] for name in wanted} == wanted
    assert readers["full"].variants == {
        "selectors": ("mean-key", "window"),
        "budgets": (64, 128),
        "own_prefill": True,
    }
    assert data["settings"]["pages"]["selector"] == "low-rank"


def test_the_default_lengths_are_those_of_the_device(run):
    data = run("eval", "needle", "--depths", "1", "--needles", "1", "--strategies", "rag", "-q", "--json").json
    assert data["settings"]["lengths"] == [1024, 2048, 4096]


def test_essays_come_from_the_folder_that_the_environment_names(run, monkeypatch):
    essays = Path("data/needle/PaulGrahamEssays")
    essays.mkdir(parents=True)
    (essays / "a.txt").write_text("An essay that says little. " * 3)
    monkeypatch.setenv("RAGKIT_DATA", "data")
    assert run(*NEEDLE, "--json").json["settings"]["texts"] == "public"


@pytest.mark.parametrize(("command", "name"), [(NEEDLE, "needle"), (RULER, "ruler")])
def test_the_heat_map_is_an_svg_and_the_numbers_a_file(run, command, name):
    result = run(*command, "--plot", "plots", "--out", "raw.json", "--json")
    assert result.json["plots"] == [f"plots/{name}_heat_map.svg"]
    assert json.loads(Path("raw.json").read_text()) == result.json
    root = ElementTree.parse(result.json["plots"][0]).getroot()
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"full", "rag", "tokens", "2,000"} - {"full" if name == "ruler" else ""} <= texts


def test_what_was_measured_lies_in_the_file_also_where_an_answer_ends_in_an_error_nobody_foresaw(
    run, readers, tmp_path, monkeypatch
):
    out = tmp_path / "needle.json"

    def broken(*arguments):
        raise RuntimeError("a launch failed")
        yield

    monkeypatch.setattr(readers["rag"], "answer", broken, raising=False)
    result = run(*NEEDLE, "--out", str(out))
    assert result.code != 0
    assert "a launch failed" in result.err
    left = json.loads(out.read_text(encoding="utf-8"))
    assert (left["interrupted"], [one["strategy"] for one in left["outcomes"]]) == (True, ["full"])


def test_ctrl_c_shows_what_is_done_and_ends_with_130(run, readers):
    readers["rag"].stop_after = 4
    result = run(*NEEDLE, "--json")
    assert (result.code, result.err) == (130, "")
    assert result.json["interrupted"] is True
    assert len(result.json["outcomes"]) == 7  # three documents to both, and one that full does not take


def test_ctrl_c_before_anything_is_done_says_so(run, readers):
    readers["rag"].stop_after = 0
    result = run(*NEEDLE, "--strategies", "rag")
    assert (result.code, result.out) == (130, "nothing was measured\n")


def test_a_time_limit_leaves_out_the_rest_and_says_so(run):
    data = run(*NEEDLE, "--time-limit", "0", "--json").json
    assert len(data["outcomes"]) == 1
    assert data["notes"] == ["the time limit left out 23 of 24 readings of documents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*NEEDLE, "--lengths", "0"), "--lengths takes whole numbers from 1 on, separated by commas, got '0'"),
        ((*NEEDLE, "--lengths", "8k"), "--lengths takes whole numbers from 1 on, separated by commas, got '8k'"),
        ((*NEEDLE, "--lengths", "50"), "needle was left out at 50 tokens: a length of 50 tokens leaves no room"),
        (
            (*NEEDLE, "--strategies", "best"),
            "--strategies takes some of full, rag, pages, separated by commas",
        ),
        ((*NEEDLE, "--lengths", "9000", "--strategies", "full"), "full was not asked at 9,000 tokens: it takes 1,500"),
        ((*NEEDLE, "--strategies", "pages", "--selectors", "best"), "--selectors takes some of everything, window,"),
        ((*NEEDLE, "--strategies", "pages", "--budgets", "2k"), "--budgets takes whole numbers from 1 on"),
        ((*NEEDLE, "--own-prefill"), "--selectors, --budgets and --own-prefill are for pages: add it to --strategies"),
        ((*NEEDLE, "--depths", "0"), "Invalid value for '--depths'"),
        ((*NEEDLE, "--needles", "0"), "Invalid value for '--needles'"),
        ((*NEEDLE, "--data", "gone"), "the folder gone of public texts does not exist"),
        ((*NEEDLE, "--out", "gone/a.json"), "--out: gone/a.json is a folder, or lies in none"),
        ((*RULER, "--tasks", "vtt"), "--tasks: there is no task 'vtt': did you mean 'vt'? There are niah_single_1,"),
        ((*RULER, "--items", "0"), "Invalid value for '--items'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(run, arguments, message):
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert message in result.err


def test_without_matplotlib_a_plot_fails_at_once_naming_the_extra(run, monkeypatch):
    monkeypatch.setattr("ragkit.figures.find_spec", lambda name: None)
    result = run(*NEEDLE, "--plot", "plots")
    assert (result.code, result.out) == (1, "")
    assert "pip install 'ragkit[plots]'" in result.err


def test_a_heat_map_shows_numbers_alone_where_stdout_has_no_blocks(monkeypatch):
    class Ascii:
        encoding = "ascii"

    values = {("a", "1"): 0.0, ("a", "20"): 39.6, ("b", "1"): 100.0}
    lines = list(heat_map(["a", "b"], ["1", "20"], values, "row"))
    assert [line.split() for line in lines[1:3]] == [["a", "0", "░░░", "40"], ["b", "███", "100"]]
    assert len(lines) == 4
    monkeypatch.setattr("sys.stdout", Ascii())
    assert [line.split() for line in heat_map(["a", "b"], ["1", "20"], values)][1:] == [["a", "0", "40"], ["b", "100"]]
