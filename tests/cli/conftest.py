"""Runs commands through `main`, so that exit codes and messages are covered, over a pipeline double."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pipeline_double import FakePipeline, World

from ragkit.cli.app import main


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give every test an empty working folder and an environment without settings."""
    for name in list(_settings_in_environment()):
        monkeypatch.delenv(name)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")  # set, so that monkeypatch restores what a command changes
    monkeypatch.setenv("RAGKIT_HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A double in place of the pipeline."""
    world = World()
    module = ModuleType("ragkit.pipeline")
    module.Pipeline = type("Pipeline", (FakePipeline,), {"world": world})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ragkit.pipeline", module)
    return world


@pytest.fixture
def run(world: World, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run `ragkit` with some arguments, over the double."""
    return runner(capsys)


def runner(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Return what runs `ragkit` through `main` and catches its output."""

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        code = main(list(arguments))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def _settings_in_environment() -> Iterator[str]:
    return (name for name in os.environ if name.startswith("RAGKIT_"))
