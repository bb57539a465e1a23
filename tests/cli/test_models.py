"""`ragkit models`: list, pull, path."""

from __future__ import annotations

from pathlib import Path

import pytest

import ragkit.models
from ragkit.errors import ModelError, OfflineError
from ragkit.models import ModelInfo, ModelRole


@pytest.fixture(autouse=True)
def resolved(monkeypatch) -> list[tuple[str, bool]]:
    """Stand in for `resolve`: `here` is on this machine, `there` would be fetched."""
    calls = []

    def resolve(name, *, offline=False, progress=None):
        calls.append((name, offline))
        if name == "there" and offline:
            raise OfflineError("there was not pulled yet and fetching is off")
        if name == "nowhere":
            raise ModelError("there is no model 'nowhere'")
        if progress is not None:
            progress.message(f"{name}: downloading")
        return Path("/models") / name

    monkeypatch.setattr(ragkit.models, "resolve", resolve)
    return calls


def test_pull_fetches_the_named_models(run):
    result = run("models", "pull", "here", "there")
    assert result.code == 0
    assert result.out == "here  /models/here\nthere  /models/there\n"
    assert result.err == "here: downloading\nthere: downloading\n"
    assert run("models", "pull", "here", "--json").json == {"models": [{"name": "here", "path": "/models/here"}]}


def test_pull_without_names_fetches_the_configured_models(run, resolved):
    assert run("models", "pull", "-q").err == ""
    assert [name for name, _ in resolved] == ["all-minilm-l6-v2", "smollm2-135m-instruct"]


def test_pull_offline_fails_naming_the_model(run):
    result = run("models", "pull", "there", "--offline", "--json")
    assert (result.code, result.json["error"]["code"]) == (1, "offline")


def test_path_fetches_nothing(run, resolved):
    assert run("models", "path", "here").out == "/models/here\n"
    result = run("models", "path", "there")
    assert result.code == 1
    assert result.err == "error: there is not on this machine; `ragkit models pull there` fetches it\n"
    assert resolved == [("here", True), ("there", True)]


def test_an_unknown_model_is_a_failure(run):
    assert run("models", "path", "nowhere").err == "error: there is no model 'nowhere'\n"


def test_list_shows_what_is_here_and_what_is_not(run, monkeypatch):
    infos = [
        ModelInfo("minilm", ModelRole.EMBEDDER, Path("/models/minilm"), 88_000_000, "Apache-2.0", "a wheel"),
        ModelInfo("tiny", ModelRole.GENERATOR, None, 98_000_000, "MIT", "another wheel"),
    ]
    monkeypatch.setattr(ragkit.models, "list_models", lambda: infos)
    assert run("models", "list").out.splitlines() == [
        "NAME    ROLE       SIZE     LICENCE     HERE  SOURCE",
        "minilm  embedder   88.0 MB  Apache-2.0  yes   a wheel",
        "tiny    generator  98.0 MB  MIT         no    another wheel",
    ]
    assert run("models", "list", "--json").json["models"][1] == {
        "name": "tiny",
        "role": "generator",
        "path": None,
        "bytes": 98_000_000,
        "licence": "MIT",
        "source": "another wheel",
    }
