"""`ragkit config show`: every setting, and where it came from."""

from __future__ import annotations

import tomllib
from pathlib import Path

from ragkit.settings import setting_keys


def test_every_setting_is_shown_as_toml(run):
    values = tomllib.loads(run("config", "show").out)
    shown = {f"{section}.{key}" for section, part in values.items() if isinstance(part, dict) for key in part}
    shown |= {key for key, value in values.items() if not isinstance(value, dict)}
    assert shown == set(setting_keys())
    assert values["generation"]["temperature"] == 0.0


def test_origins_are_comments_beside_the_values(run, monkeypatch):
    Path("ragkit.toml").write_text("[retrieval]\nk = 3\n")
    monkeypatch.setenv("RAGKIT_GENERATION_SEED", "5")
    lines = run("config", "show", "--origin", "--device", "cpu").out.splitlines()
    origins = {line.split(" = ")[0]: line.split("# ")[1] for line in lines}
    assert origins["retrieval.k"] == "ragkit.toml line 2"
    assert origins["generation.seed"] == "RAGKIT_GENERATION_SEED"
    assert origins["device"] == "--device"
    assert origins["offline"] == "default"


def test_the_json_holds_value_and_origin(run):
    settings = run("config", "show", "--json", "--store", "here").json["settings"]
    assert settings["store"] == {"value": "here", "origin": "--store"}
    assert settings["retrieval.mode"] == {"value": "hybrid", "origin": "default"}
    assert settings["ingest.include"] == {"value": [], "origin": "default"}


def test_a_broken_file_is_an_error_that_names_it(run):
    Path("ragkit.toml").write_text("[retrieval]\nkk = 3\n")
    result = run("config", "show")
    assert result.code == 2
    assert result.err == "error: unknown setting 'retrieval.kk' in ragkit.toml line 2; did you mean retrieval.k?\n"
