"""Full attention over the whole document: what every other way of answering is compared with, up to the window."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from ragkit.bench.long_answers import (
    AnswererTools,
    LongAnswer,
    chunk_of,
    fresh_builder,
    generate_text,
    with_prefix,
)
from ragkit.bench.long_items import LongQuestion
from ragkit.errors import GenerationError
from ragkit.generation.decoder import Decoder
from ragkit.generation.engine import Engine
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.strategy import PrefillRequest, PrefillResult, PrefillStrategy
from ragkit.kvcache.request_kv import RequestKV
from ragkit.types import Prompt


class FullAnswerer:
    """Prefills the document once, and every question behind it."""

    def __init__(self, tools: AnswererTools) -> None:
        self._tools = tools

    @property
    def name(self) -> str:
        """What results call it."""
        return "full"

    @property
    def most_tokens(self) -> int:
        """The model's window."""
        return self._tools.engine.max_context

    def answer(self, document: str, questions: Sequence[LongQuestion], max_new_tokens: int) -> Iterator[LongAnswer]:
        """Yield what `LongContextAnswerer.answer` says."""
        engine = self._tools.engine
        prompts = self._prompts(document, questions, max_new_tokens)
        started = time.perf_counter()
        with RequestKV(engine.pool) as held:
            strategy: PrefillStrategy = FullPrefill()
            if self._can_hold(prompts, max_new_tokens):
                strategy = _BehindDocument(engine, held, Prompt(prompts[0].segments[:2]))
            document_seconds = time.perf_counter() - started
            for prompt in prompts:
                started = time.perf_counter()
                text = generate_text(engine, prompt, max_new_tokens, strategy)
                seconds = time.perf_counter() - started
                yield LongAnswer(text, ((0, len(document)),), len(prompt), document_seconds, seconds)

    def _can_hold(self, prompts: Sequence[Prompt], max_new_tokens: int) -> bool:
        """Return whether the pool has room for a question beside the document's blocks, of which the last has gaps.

        Where it has not, just below the window, every question prefills the document anew.
        """
        pool = self._tools.engine.pool
        begun = len(Prompt(prompts[0].segments[:2]))
        own = max(len(prompt) for prompt in prompts) - begun + max_new_tokens
        return pool.blocks_for(begun) + pool.blocks_for(own) <= pool.num_free

    def _prompts(self, document: str, questions: Sequence[LongQuestion], max_new_tokens: int) -> list[Prompt]:
        engine = self._tools.engine
        builder, chunk = fresh_builder(self._tools), chunk_of(document)
        prompts = []
        for question in questions:
            begun = engine.tokenizer.encode(question.answer_prefix)
            built = builder.build(question.text, [chunk], max_new_tokens=max_new_tokens + len(begun))
            if built.dropped_chunks:
                tokens = len(builder.chunk_segment(chunk).token_ids)
                raise GenerationError(
                    f"a document of {tokens:,} tokens, question and answer do not fit into the window of "
                    f"{engine.model_name}, {engine.max_context:,} tokens"
                )
            prompts.append(with_prefix(built.prompt, begun))
        return prompts


class _BehindDocument:
    """Full prefill whose first rows, the frame's and the document's, are there already.

    Args:
        engine: the model.
        held: the request that keeps these rows, until who made it releases it.
        beginning: the segments that all prompts share.
    """

    def __init__(self, engine: Engine, held: RequestKV, beginning: Prompt) -> None:
        self._held = held
        self._full = FullPrefill()
        rotary = engine.rotary.table(len(beginning), len(beginning))
        with torch.inference_mode():
            token_ids = PrefillRequest(beginning, held, rotary).token_ids()
            self._full.extend(engine.decoder, held, rotary, token_ids)

    @property
    def name(self) -> str:
        """The strategy whose result it gives."""
        return self._full.name

    def prefill(self, decoder: Decoder, request: PrefillRequest) -> PrefillResult:
        """Return the logits of the first token, computed behind the document's rows."""
        num_held = self._held.num_tokens
        request.kv.append_shared(self._held.block_ids, num_held)
        fresh = request.token_ids()[num_held:]
        logits = self._full.extend(decoder, request.kv, request.rotary, fresh)
        return PrefillResult(logits, reused=num_held, recomputed=len(fresh))
