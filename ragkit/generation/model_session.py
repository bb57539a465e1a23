"""What a drafting model keeps of one request: rows of every prompt that it drafts from, and the answer behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from ragkit.errors import CacheCapacityError
from ragkit.generation.decode_state import DecodeState
from ragkit.generation.draft_model import DraftModel
from ragkit.generation.draft_runner import MOST_STEPS
from ragkit.generation.draft_times import StepTimes
from ragkit.generation.drafter import DraftContext
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.strategy import PrefillRequest
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.types import Prompt

if TYPE_CHECKING:
    from ragkit.generation.engine import Engine

_SEED_OFFSET = 0x5EED  # the drafter's random numbers are not those that accept

DraftPrompts = Callable[[Prompt], Sequence[Prompt]]


class ModelSession:
    """The model's KV of one request.

    Args:
        model: drafts.
        target: the engine that verifies.
        prompts: the prompts to draft from.
        context: the request.
        times: what drafts take.

    Attributes:
        paths: one for each prompt; none where the model does not know all tokens.
        temperature: that tokens are drawn with; 0 takes the most likely ones.
    """

    def __init__(
        self, model: DraftModel, target: Engine, prompts: DraftPrompts, context: DraftContext, times: StepTimes
    ) -> None:
        self._model = model
        self._target = target
        self._prompts = prompts
        self._context = context
        sampling = context.sampling
        # A distribution is needed for transfer even where the target's own tokens are the most likely ones.
        self.temperature = sampling.temperature or float(context.needs_probabilities)
        self._generator = torch.Generator().manual_seed(sampling.seed ^ _SEED_OFFSET)
        self._times = times
        self._answer: list[int] = []
        self.paths: list[ModelPath] = []
        self._begin(context.prompt)

    @property
    def step_ms(self) -> float:
        """Measured milliseconds of one more step."""
        return self._times.step_ms

    @property
    def first_ms(self) -> float:
        """Measured milliseconds of a draft of one token."""
        return self._times.first_ms

    @property
    def behind_ms(self) -> float:
        """Measured milliseconds of reading what it is far behind."""
        return self._times.behind_ms

    @property
    def step_share(self) -> float:
        """Bytes of a step of the drafter over those of a plain step of the target."""
        tokens = sum(path.state.kv.num_tokens for path in self.paths)
        return self._model.step_share(self._target, tokens, len(self._context.prompt))

    @property
    def lag(self) -> int:
        """Tokens that its model has not read yet."""
        return max((len(path.pending) for path in self.paths), default=0)

    @property
    def has_room(self) -> bool:
        """Whether a token can be drafted behind those noted so far."""
        return bool(self.paths) and all(path.room > 0 for path in self.paths)

    def uniforms(self, steps: int) -> torch.Tensor:
        """Return (paths, steps) fp32 numbers in [0, 1)."""
        return torch.rand((len(self.paths), steps), generator=self._generator)

    def accept(self, token_ids: Sequence[int]) -> None:
        """Note the next tokens of the answer; rows of drafts that stood are kept."""
        self._answer += token_ids
        if not self._knows(token_ids):
            self.close()  # it knows nothing behind such a token, either
        for path in self.paths:
            path.accept(token_ids)

    def refresh(self, prompt: Prompt) -> None:
        """Draft from another prompt, behind which the answer is read anew."""
        self.close()
        self._begin(prompt)
        answer, self._answer = self._answer, []
        self.accept(answer)

    def holds_blocks_of(self, pool: KVPool) -> bool:
        """Return whether its rows lie there: those of another model lie in that model's own pool."""
        return bool(self.paths) and self._model.engine.pool is pool

    def close(self) -> None:
        """Give the rows back."""
        paths, self.paths = self.paths, []
        for path in paths:
            path.close()

    @torch.inference_mode()
    def _begin(self, prompt: Prompt) -> None:
        try:
            prompts = self._prompts(prompt)
            if not all(self._knows(one.token_ids) for one in prompts):
                return
            for one in prompts:
                self.paths.append(self._path(one, self._context.sampling))
        except BaseException:
            self.close()
            raise

    def _knows(self, token_ids: Sequence[int]) -> bool:
        return max(token_ids, default=0) < self._model.decoder.config.vocab_size

    def _path(self, prompt: Prompt, sampling: SamplingConfig) -> ModelPath:
        model = self._model
        window = model.engine.max_context
        total = min(len(prompt) + sampling.max_new_tokens + MOST_STEPS, window)
        if len(prompt) >= total:
            raise CacheCapacityError(
                f"a prompt of {len(prompt)} tokens leaves no room to draft in a window of {window}: give fewer chunks, "
                "or draft with self from fewer of them (draft.context_tokens)"
            )
        pool = model.engine.pool
        with ExitStack() as held:
            # Requests are not to find taken what they were let in for: an answer can do without drafts.
            spare = held.enter_context(model.engine.admission.spare(pool.blocks_for(total) + len(prompt.segments)))
            kv = held.enter_context(RequestKV(pool))
            rotary = model.engine.rotary.table(total, prompt_tokens=len(prompt))
            request = PrefillRequest(prompt, kv, rotary, answer_tokens=total - len(prompt))
            model.strategy.prefill(model.reader, request)
            kv.reserve(total)
            spare.has_taken()
            return ModelPath(model.runner.begin(kv, rotary), total, held.pop_all())


class ModelPath:
    """One prompt's rows, the tokens that are not among them yet, and what was drafted behind.

    Args:
        state: the rows.
        most_tokens: positions that may be written; blocks may have more, which lie behind the model's window.
        held: gives the rows back.
    """

    def __init__(self, state: DecodeState, most_tokens: int, held: ExitStack) -> None:
        self.state = state
        self._most_tokens = most_tokens
        self._held = held
        self.pending: list[int] = []
        self._drafted: list[int] = []  # whose rows are written, behind the kept ones

    def close(self) -> None:
        """Give the rows back; twice is harmless."""
        self._held.close()

    @property
    def room(self) -> int:
        """Tokens that can be drafted behind the pending ones: the row of the last is not written."""
        return self._most_tokens - self.state.kv.num_tokens - len(self.pending) + 1

    def note(self, token_ids: Sequence[int]) -> None:
        """Note a chain that was drafted behind the pending tokens, whose rows are kept now."""
        self.pending = []
        self._drafted = list(token_ids[:-1])

    def accept(self, token_ids: Sequence[int]) -> None:
        """Keep the rows of tokens that were drafted, and have the others computed before the next draft."""
        for index, token in enumerate(token_ids):
            is_last = index == len(token_ids) - 1  # a draft begins behind at least one token that is not computed
            if not is_last and not self.pending and self._drafted[:1] == [token]:
                self.state.kv.num_tokens += 1
                del self._drafted[0]
            else:
                self.pending.append(token)
                self._drafted = []
