"""The examples in the documents run as they stand: the Python blocks of a page, one after the other, are one script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script_of(page: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("zeroconf.html", "inmemorydb.html", "result_codes.csv"):
        shutil.copy(ROOT / "examples" / "collection" / name, docs)
    return tmp_path


def run(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "RAGKIT_OFFLINE": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.models
def test_the_examples_of_the_sdk_run(folder: Path):
    pytest.importorskip("sqlalchemy", reason="the extra sql is not installed")
    lines = run(script_of("sdk.md"), folder).splitlines()
    assert lines[0] == "3 added, 0 unchanged, 0 failed"
    assert re.fullmatch(r"\['sqlite:///.*#id=n1'\]", lines[1])
    assert re.fullmatch(r"\d+ chunks, \d+ bytes", lines[-1])
    assert (folder / "chunks.parquet").exists()


@pytest.mark.models
def test_the_examples_of_llama_index_run(folder: Path):
    pytest.importorskip("llama_index.core", reason="the extra llama-index is not installed")
    lines = run(script_of("llama_index.md"), folder).splitlines()
    assert "llama-index:n1#node=" in "\n".join(lines)
    assert lines[-2:] == ["1 added", "1 added"]


@pytest.mark.parametrize("page", ["sdk.md", "llama_index.md"])
def test_examples_are_valid_python(page: str):
    script = script_of(page)
    assert len(script) > 500
    compile(script, page, "exec")
