import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for store_samples, which child processes import as well

from ragkit.store import Store, faults


@pytest.fixture
def memory_path(tmp_path):
    """A folder on a file system in memory where there is one: a kill does not care, and syncing costs nothing."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="ragkit-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def store(memory_path):
    with Store.create(memory_path / "store") as made:
        yield made


@pytest.fixture(autouse=True)
def _no_faults(monkeypatch):
    monkeypatch.delenv("RAGKIT_CRASH_AT", raising=False)
    monkeypatch.delenv("RAGKIT_ENOSPC_AT", raising=False)
    faults.restart()
