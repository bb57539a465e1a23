"""One request of a running batch: what was asked, what is there of its answer, and what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ragkit.generation.batch_entries import RequestEntry
from ragkit.generation.batch_request import BatchRequest, BatchResult
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.packed_pass import PackedRequest
from ragkit.generation.sampling import Sampler, SamplingConfig
from ragkit.generation.speculative_decode import SpeculativeRequest
from ragkit.generation.steps import Finished, FinishReason
from ragkit.generation.strategy import PrefillResult, PrefillStrategy
from ragkit.generation.verification import Verifier
from ragkit.types import DraftUse, KVUse, Prompt, TextTokenizer, TokenUsage


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
        drafted: what drafts it, and has the same tokens; None where nothing does.
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
    drafted: SpeculativeRequest | None = None
    retries: int = 0
    _sampler: Sampler | None = None
    _started: float = 0.0
    _first_token_ms: float = 0.0

    @property
    def rows(self) -> PackedRequest:
        """Its rows, which whatever runs has."""
        assert self.packed is not None, "a job that runs has rows"
        return self.packed

    def start(self) -> None:
        """Note that it runs now, the first time."""
        if not self._started:
            self._started = time.perf_counter()

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return its own tokens from `start` up to `stop`, counted behind what it lists: prompt, then answer."""
        first, end = self.shared_tokens + start, self.shared_tokens + stop
        size = len(self.token_ids)
        return [*self.token_ids[first:end], *self.answer[max(first - size, 0) : max(end - size, 0)]]

    def take(
        self, logits: Tensor, likeliest: Sequence[int], tree: DraftTree | None, verifier: Verifier | None
    ) -> FinishReason | None:
        """Add what a step brought to the answer; return why it ends, if it does.

        Args:
            logits: (nodes + 1, vocab_size): after its last token, and after each drafted one.
            likeliest: the token with the highest of each row.
            tree: what was drafted; None for the first token behind a prefill.
            verifier: did the pass; None where the step has kept its row.
        """
        if not self._first_token_ms:
            self._first_token_ms = self._elapsed_ms()
        if self.drafted is not None:
            if tree is None:
                self.drafted.first(logits[0])
            else:
                self.drafted.take(logits, tree, verifier, likeliest)
            return self.drafted.reason
        if verifier is not None and self.rows.state is not None:
            verifier.commit(self.rows.state, ())
        token = likeliest[0] if self.sampling.temperature == 0 else self._draw(logits[0])
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
        drafted = self.drafted
        finished = Finished(
            "", reason, tuple(self.answer), usage, timings,
            KVUse() if prefilled is None else prefilled.kv,
            (() if prefilled is None else prefilled.warnings) + (() if drafted is None else drafted.warnings),
            DraftUse() if drafted is None else drafted.use(),
        )  # fmt: skip
        return BatchResult(self.request.request_id, tokenizer.decode(self.answer), finished)

    def _draw(self, logits: Tensor) -> int:
        """Return the next token by the request's own random numbers."""
        if self._sampler is None:
            self._sampler = Sampler(self.sampling)
        return self._sampler.next(logits)

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self._started) * 1e3
