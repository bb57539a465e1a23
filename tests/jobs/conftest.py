"""What tests of jobs begin with: a store whose answers are known, and the engine that gives them."""

from pathlib import Path

import pytest
from batch_world import load_engine, write_world

from ragkit.generation.engine import Engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(world: Path) -> Engine:
    return load_engine(world)
