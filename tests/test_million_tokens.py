"""The command that reads a text of a million tokens, with a short stand-in."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_generator import write_generator

from ragkit.bench.made_text import made_sentences

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "million_tokens.sh"
RAGKIT = Path(sys.executable).parent / "ragkit"


def run(folder: Path, *arguments: str, model: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAGKIT": str(RAGKIT), "RAGKIT_STORE": str(folder / "store"), "RAGKIT_OFFLINE": "1"}
    environment["RAGKIT_GENERATION_MAX_NEW_TOKENS"] = "4"
    if model is not None:
        environment["RAGKIT_GENERATION_MODEL"] = model
    return subprocess.run(
        ["sh", str(SCRIPT), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def read_and_ask(folder: Path, sentences: int, model: str | None = None) -> None:
    text = "".join(itertools.islice(made_sentences(1), sentences)).strip()
    (folder / "text.txt").write_text(text, encoding="utf-8")
    first = run(folder, "text.txt", "Where did the traveller rest?", model=model)
    assert first.returncode == 0, first.stderr
    assert "text.txt into pages: " in first.stderr
    assert "1 documents read into pages" in first.stdout
    again = run(folder, "text.txt", "Where did the traveller rest?", model=model)
    assert again.returncode == 0, again.stderr
    assert "0 documents read into pages (0 tokens, 0 B), 1 there already" in again.stdout


@pytest.mark.models
def test_sixty_thousand_tokens_are_read_once_their_price_is_said_and_they_are_answered(tmp_path):
    # A tiny model, one token a character.
    read_and_ask(tmp_path, 850, str(write_generator(tmp_path / "generator")))


@pytest.mark.models
@pytest.mark.slow
def test_the_bundled_model_reads_sixty_thousand_tokens(tmp_path):
    read_and_ask(tmp_path, 3600)


def test_without_the_text_the_command_says_how_to_get_it(tmp_path):
    if shutil.which("bible"):
        pytest.skip("the text is installed")
    done = run(tmp_path)
    assert done.returncode == 2
    assert "apt install bible-kjv bible-kjv-text" in done.stderr
