"""The seam between questions about long documents and whatever answers them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ragkit.bench.long_items import CharSpan, LongQuestion
from ragkit.config import PageSelectorName, PipelineConfig
from ragkit.generation.engine import Engine
from ragkit.generation.prompt import PromptBuilder
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import GenerationStep
from ragkit.generation.strategy import PrefillStrategy
from ragkit.models.chat_template import ChatTemplate
from ragkit.retrieval.base import Embedder
from ragkit.types import Chunk, Prompt, Segment, chunk_id_of


@dataclass(frozen=True, slots=True)
class LongAnswer:
    """What was answered to one question.

    Attributes:
        text: the answer, without the prefix that was given.
        shown: characters of the document that the model had before it.
        prompt_tokens: length of its prompt.
        document_seconds: reading the document, before any question was known.
        seconds: from the question to the end of the answer.
    """

    text: str
    shown: tuple[CharSpan, ...]
    prompt_tokens: int
    document_seconds: float
    seconds: float


class LongContextAnswerer(Protocol):
    """Reads a document once and answers all questions about it; greedy, without knowing them while it reads."""

    @property
    def name(self) -> str:
        """What results call it."""
        ...

    @property
    def most_tokens(self) -> int:
        """Most tokens of document, question and answer together; 0 where any length goes."""
        ...

    def answer(self, document: str, questions: Sequence[LongQuestion], max_new_tokens: int) -> Iterator[LongAnswer]:
        """Yield an answer a question, in order.

        Raises:
            GenerationError: the document is too long.
            KVCacheError: its KV does not fit.
        """
        ...


@dataclass(frozen=True, slots=True)
class PagesVariants:
    """What of answers from pages is compared.

    Attributes:
        selectors: page selectors; empty for the configured one.
        budgets: tokens of the pages that they find; empty for the configured number.
        found_times: how many times as many they find first; empty for the configured number.
        own_prefill: whether each of these reads the documents itself, instead of the configured one for all.
    """

    selectors: tuple[PageSelectorName, ...] = ()
    budgets: tuple[int, ...] = ()
    found_times: tuple[int, ...] = ()
    own_prefill: bool = False


@dataclass(frozen=True, slots=True)
class AnswererTools:
    """What answerers are made of; `embedder` is None where none of them retrieves."""

    engine: Engine
    embedder: Embedder | None
    config: PipelineConfig
    pages: PagesVariants = PagesVariants()


def fresh_builder(tools: AnswererTools) -> PromptBuilder:
    """Return a builder of prompts that remembers no chunk: a document of a million tokens is asked about once."""
    engine = tools.engine
    return PromptBuilder(
        engine.tokenizer, ChatTemplate(engine.folder), engine.max_context, tools.config.generation.system_prompt
    )


def frame_tokens(tools: AnswererTools) -> int:
    """Return the tokens of a prompt besides document, question and answer, with two for what joins them."""
    builder = fresh_builder(tools)
    empty = builder.build("", (), max_new_tokens=1).prompt
    return len(empty) + len(builder.chunk_segment(chunk_of("")).token_ids) + 2


def chunk_of(document: str, start: int = 0, stop: int | None = None) -> Chunk:
    """Return a span of a document as a chunk."""
    end = len(document) if stop is None else stop
    return Chunk(chunk_id_of("long-document", start, end), "long-document", 0, document[start:end], start, end, 0)


def with_prefix(prompt: Prompt, token_ids: Sequence[int]) -> Prompt:
    """Return the prompt with the answer's first tokens behind it."""
    return Prompt((*prompt.segments, Segment(tuple(token_ids))))


def generate_text(engine: Engine, prompt: Prompt, max_new_tokens: int, strategy: str | PrefillStrategy = "full") -> str:
    """Return what the model says after `prompt`, greedily."""
    return text_of(engine.generate(prompt, SamplingConfig(max_new_tokens), strategy))


def text_of(steps: Iterator[GenerationStep]) -> str:
    """Return the whole text of an answer."""
    return "".join(step.piece for step in steps)
