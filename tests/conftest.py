"""Settings that hold for every test, and what many of them begin with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ragkit.generation.engine import Engine

# Triton reads this when a kernel is imported. Without a GPU the kernels' tests run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the test caches in its own folder."""
    monkeypatch.setenv("RAGKIT_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny generator in fp32 on the CPU."""
    from tiny_generator import write_generator

    from ragkit.generation.engine import Engine

    return Engine.load(write_generator(tmp_path_factory.mktemp("tiny")), device="cpu", dtype="float32")
