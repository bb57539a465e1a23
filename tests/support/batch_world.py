"""A store, a tiny generator and questions for tests of batches; everything answers in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blended_pipeline import CONFIG, write_documents
from doubles import HashEmbedder
from tiny_generator import write_generator

from ragkit import Pipeline
from ragkit.config import BatchConfig, PipelineConfig, Strategy
from ragkit.generation.engine import Engine

SUBJECTS = ("otters", "miller", "market", "bridge", "lamp", "harbour", "winter", "copper")
FULL = replace(
    CONFIG,
    generation=replace(CONFIG.generation, strategy=Strategy.FULL, max_new_tokens=4),
    batch=BatchConfig(max_running=4, look_ahead=8),  # so that answers do not all end at once
)


def write_world(folder: Path) -> Path:
    """Write a generator and a store of three documents, and return the folder."""
    engine = load_engine(write_generator(folder / "generator").parent)
    with open_world(folder, engine) as pipeline:
        pipeline.ingest([write_documents(folder / "docs")])
    return folder


def load_engine(folder: Path) -> Engine:
    """Return the generator of a world."""
    return Engine.load(folder / "generator", device="cpu", dtype="float32", kv_tokens=16384)


def open_world(folder: Path, engine: Engine, config: PipelineConfig = FULL) -> Pipeline:
    """Return a pipeline over a world."""
    return Pipeline.open(folder / "store", config, embedder=HashEmbedder(), tokenizer=engine.tokenizer, engine=engine)


def questions(count: int) -> list[dict[str, Any]]:
    """Return rows with ids and different questions."""
    return [
        {"id": f"q{number}", "question": f"Where is the {SUBJECTS[number % len(SUBJECTS)]} number {number}?"}
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    """Write rows, each an object or a line as it is to stand there."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of answers."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
