"""One request of a running batch: what was asked, what is there of its answer, and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from ragkit.generation.batch_entries import RequestEntry
from ragkit.generation.batch_request import BatchRequest, BatchResult
from ragkit.generation.packed_pass import PackedRequest
from ragkit.generation.sampling import Sampler, SamplingConfig
from ragkit.generation.steps import Finished, FinishReason
from ragkit.generation.strategy import PrefillResult, PrefillStrategy
from ragkit.types import Prompt, TextTokenizer, TokenUsage


@dataclass(slots=True, eq=False)
class BatchJob:
    """One request of a running batch.

    Attributes:
        request: what was asked.
        prompt: its prompt as it is computed; chunks may have changed places.
        sampling: its sampling, cut to what the window leaves.
        stops: tokens that end the answer.
        strategy: what prefills it in one go; None where it is prefilled in pieces.
        token_ids: the prompt's tokens.
        shared_tokens: of these, how many first ones it lists.
        entry: what the scheduler knows of it.
        packed: its rows while it runs.
        prefilled: what its strategy returned.
        answer: tokens so far.
        retries: how often it had to wait because somebody else held the pool.
    """

    request: BatchRequest
    prompt: Prompt
    sampling: SamplingConfig
    stops: frozenset[int]
    strategy: PrefillStrategy | None
    token_ids: tuple[int, ...]
    entry: RequestEntry
    shared_tokens: int = 0
    packed: PackedRequest | None = None
    prefilled: PrefillResult | None = None
    answer: list[int] = field(default_factory=list)
    retries: int = 0
    _sampler: Sampler | None = None
    _started: float = 0.0
    _first_token_ms: float = 0.0

    def start(self) -> None:
        """Note that it runs now, the first time."""
        if not self._started:
            self._started = time.perf_counter()

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return its own tokens from `start` up to `stop`, counted behind what it lists: prompt, then answer."""
        first, end = self.shared_tokens + start, self.shared_tokens + stop
        size = len(self.token_ids)
        return [*self.token_ids[first:end], *self.answer[max(first - size, 0) : max(end - size, 0)]]

    def draw(self, logits: Tensor) -> int:
        """Return the next token by the request's own random numbers."""
        if self._sampler is None:
            self._sampler = Sampler(self.sampling)
        return self._sampler.next(logits)

    def take(self, token: int) -> FinishReason | None:
        """Add a token to the answer; return why it ends, if it does."""
        if not self._first_token_ms:
            self._first_token_ms = self._elapsed_ms()
        if token in self.stops:
            return FinishReason.STOP_TOKEN
        self.answer.append(token)
        return FinishReason.LENGTH if len(self.answer) == self.sampling.max_new_tokens else None

    def result(self, reason: FinishReason, tokenizer: TextTokenizer) -> BatchResult:
        """Return how it ended."""
        prefilled, size = self.prefilled, len(self.token_ids)
        reused = self.shared_tokens if prefilled is None else prefilled.reused
        usage = TokenUsage(size, reused, size - reused, len(self.answer))
        timings = {"prefill": self._first_token_ms, **({} if prefilled is None else prefilled.timings_ms)}
        timings |= {"first_token": self._first_token_ms, "total": self._elapsed_ms()}
        finished = Finished("", reason, tuple(self.answer), usage, timings)
        if prefilled is not None:
            finished = Finished("", reason, tuple(self.answer), usage, timings, prefilled.kv, prefilled.warnings)
        return BatchResult(self.request.request_id, tokenizer.decode(self.answer), finished)

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._started) * 1e3
