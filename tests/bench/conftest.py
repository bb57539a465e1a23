"""The tiny generator, and prompts whose chunks matter to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from blended_pipeline import text_of
from tiny_generator import write_generator

from ragkit.generation.engine import Engine
from ragkit.models import resolve
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.types import Chunk, Prompt


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(write_generator(tmp_path_factory.mktemp("tiny")), device="cpu", dtype="float32", kv_tokens=4096)


@pytest.fixture(scope="session")
def prompt_of(engine: Engine) -> Callable[[int], Prompt]:
    """Return what makes a prompt of four chunks from a seed."""

    def make(seed: int) -> Prompt:
        texts = [text_of(10 * seed + number, 3) for number in range(4)]
        chunks = [Chunk(f"{seed}-{number}", "d", number, text, 0, len(text), 1) for number, text in enumerate(texts)]
        return engine.prompt_builder().build("Where do the otters live?", chunks, max_new_tokens=64).prompt

    return make


@pytest.fixture(scope="session")
def bundled_tokenizer() -> ModelTokenizer:
    """The tokenizer of the bundled generator."""
    return ModelTokenizer(resolve("smollm2-135m-instruct", offline=True))
