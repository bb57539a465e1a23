"""The example of a batch runs: over a quarterly report where the data sets are, else over a page of the collection."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ragkit.models import list_models

ROOT = Path(__file__).resolve().parent.parent
REPORTS = Path(os.environ.get("RAGKIT_DATA") or "none") / "sec_10q"

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(
        any(model.path is None for model in list_models()), reason="the bundled models are not here: ragkit models pull"
    ),
]


@pytest.mark.parametrize(
    ("name", "environ", "rows"),
    [
        pytest.param("wal", {"RAGKIT_DATA": ""}, 2, id="collection"),
        pytest.param(
            "2023 Q1 AAPL",
            {},
            3,
            id="sec_10q",
            marks=pytest.mark.skipif(not REPORTS.exists(), reason="RAGKIT_DATA holds no sec_10q"),
        ),
    ],
)
def test_the_example_of_a_batch_answers_every_row(
    tmp_path: Path, name: str, environ: dict[str, str], rows: int
) -> None:
    collection = tmp_path / "examples" / "collection"
    collection.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "collection" / "wal.html", collection)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "batch_questions.py"), name],
        cwd=tmp_path,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == rows
    for answer in answers:
        assert answer["answer"]
        assert all(name in Path(citation["uri"]).name for citation in answer["citations"])
    assert any(answer["citations"] for answer in answers)
