"""docs/cli.md is what the application says about itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(generate):
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == generate.page(), "run `make docs`"


def test_the_page_does_not_depend_on_the_terminal(generate, monkeypatch):
    before = generate.page()
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("RAGKIT_DEVICE", "cpu")
    assert generate.page() == before


def test_checking_names_a_page_that_is_out_of_date(generate, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generate, "PAGE", tmp_path / "cli.md")
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert generate.main() == 1
    assert capsys.readouterr().err == "cli.md is out of date: run `make docs`\n"


@pytest.mark.parametrize(
    "arguments",
    [("query", "q"), ("search", "q"), ("ingest", "d"), ("ls",), ("rm", "x"), ("status",), ("gc",), ("verify",)],
)
def test_the_documented_json_keys_are_the_real_ones(run, generate, arguments):
    row = next(line for line in generate.INTRODUCTION.splitlines() if line.startswith(f"| `{arguments[0]}` |"))
    top_level = _without_nesting(row.split("|")[2])
    assert [part.strip().strip("`").split("`")[0] for part in top_level.split(",")] == list(
        run(*arguments, "--json").json
    )


def _without_nesting(text: str) -> str:
    kept, depth = [], 0
    for character in text:
        depth += character in "[{"
        if depth == 0:
            kept.append(character)
        depth -= character in "]}"
    return "".join(kept)
