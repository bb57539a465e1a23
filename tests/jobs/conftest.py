"""What tests of jobs begin with: the folder of a store whose answers are known."""

from pathlib import Path

import pytest
from batch_world import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))
