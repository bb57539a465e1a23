"""Pipelines over the tiny generator that blend, with text whose chunks matter to the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from doubles import HashEmbedder

from ragkit import Answer, Pipeline
from ragkit.config import (
    AnswerConfig,
    BlendConfig,
    ChunkingConfig,
    CodecName,
    GenerationConfig,
    KVConfig,
    LoadingMode,
    PipelineConfig,
    RetrievalConfig,
    Strategy,
)
from ragkit.generation.engine import Engine

QUESTIONS = ("Where do the otters live?", "What does the miller grind?", "When is the market held?")
CONFIG = PipelineConfig(
    chunking=ChunkingConfig(max_tokens=60),  # a sentence of `text_of` a chunk
    retrieval=RetrievalConfig(k=5),
    generation=GenerationConfig(dtype="float32", max_new_tokens=12, strategy=Strategy.BLEND),
    kv=KVConfig(codec=CodecName.FP32, loading=LoadingMode.ALWAYS),  # what is stored is found, for tests that count it
    blend=BlendConfig(ratio=0.15, min_tokens=200),
    answers=AnswerConfig(found_threshold=0.0),
)
_WORDS = ("otter", "miller", "market", "river", "bridge", "stone", "lamp", "copper", "field", "harbour", "winter")


def text_of(seed: int, sentences: int = 12) -> str:
    """Return a text of a sentence a paragraph, different for different seeds."""
    chance = random.Random(seed)
    lines = (" ".join(chance.choices(_WORDS, k=7)).capitalize() + "." for _ in range(sentences))
    return "\n\n".join(lines) + "\n"


def write_documents(folder: Path, seeds: Sequence[int] = range(3)) -> Path:
    """Write one document a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"{seed}.txt").write_text(text_of(seed), encoding="utf-8")
    return folder


def open_blended(store: Path, engine: Engine, config: PipelineConfig = CONFIG, **kv: Any) -> Pipeline:
    """Return a pipeline over the tiny generator; `kv` changes settings of its tiers."""
    config = replace(config, kv=replace(config.kv, **kv))
    return Pipeline.open(store, config, embedder=HashEmbedder(), tokenizer=engine.tokenizer, engine=engine)


def ask_all(pipeline: Pipeline, questions: Sequence[str] = QUESTIONS) -> list[str]:
    """Return the answers' texts."""
    return [pipeline.query(question).text for question in questions]


def kv_files(store: Path) -> list[Path]:
    """Return the KV segments on disk."""
    return sorted((store / "segments").rglob("*.kv"))


def reused(answer: Answer) -> tuple[int, int]:
    """Return hits and misses."""
    return answer.kv.hits, answer.kv.misses
