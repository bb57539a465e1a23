import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for store_samples, which child processes import as well

from ragkit.store import Store, faults


@pytest.fixture
def store(tmp_path):
    with Store.create(tmp_path / "store") as made:
        yield made


@pytest.fixture(autouse=True)
def _no_faults(monkeypatch):
    monkeypatch.delenv("RAGKIT_CRASH_AT", raising=False)
    monkeypatch.delenv("RAGKIT_ENOSPC_AT", raising=False)
    faults.restart()
