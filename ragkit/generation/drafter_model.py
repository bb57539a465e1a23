"""Drafts of a language model: another one with the same tokenizer, or the target itself over a shorter prompt.

A session keeps the model's own KV of the request: one chain of tokens for each prompt that it drafts from, all drafted
in the same steps and verified side by side as one tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ragkit.errors import CacheCapacityError, ConfigError
from ragkit.generation.contiguous_draft import ChainRunner, ContiguousDraftRunner
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.decode_state import DecodeState
from ragkit.generation.draft_runner import MOST_STEPS, DraftRunner, DrawnSteps
from ragkit.generation.draft_tree import DraftTree, joined
from ragkit.generation.drafter import DraftBudget, DraftContext, DraftSession
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.strategy import PrefillRequest, PrefillStrategy
from ragkit.generation.verify_runner import VerifyRunner
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.types import Prompt

if TYPE_CHECKING:
    from ragkit.generation.decoder import Decoder
    from ragkit.generation.engine import Engine

_NEWEST = 0.3  # say of the newest draft in what a step takes
_OUTLIER = 3.0  # a step that took so many times what is known counts as this
_SEED_OFFSET = 0x5EED  # the drafter's random numbers are not those that accept

DraftPrompts = Callable[[Prompt], Sequence[Prompt]]


@dataclass(frozen=True, slots=True)
class DraftModel:
    """What drafts: weights, and where their KV lies.

    Attributes:
        engine: whose pool and rotary tables are used.
        decoder: the weights; the engine's own, or a cheaper variant with KV of the same shape.
        runner: drafts chains with them.
        strategy: brings the prompt's rows into the pool.
        weight_bytes: bytes that a step reads of them.
    """

    engine: Engine
    decoder: Decoder
    runner: ChainRunner
    strategy: PrefillStrategy
    weight_bytes: int

    @classmethod
    def of(cls, engine: Engine, decoder: Decoder | None = None, strategy: PrefillStrategy | None = None) -> DraftModel:
        """Return the model of `engine`, or a variant of it; its prompts are computed in full by default."""
        decoder = decoder or engine.decoder
        on_gpu = decoder.device.type == "cuda"
        runner = GraphDraftRunner.of(engine, decoder) if on_gpu else ContiguousDraftRunner(decoder)
        return cls(engine, decoder, runner, strategy or FullPrefill(), weight_bytes(decoder))


@dataclass(frozen=True, slots=True)
class GraphDraftRunner:
    """Chains by CUDA graphs, over an engine's pool."""

    _runner: DraftRunner

    @classmethod
    def of(cls, engine: Engine, decoder: Decoder) -> GraphDraftRunner:
        """Return the runner of `decoder`, whose rows lie in the engine's pool."""
        assert isinstance(engine.step_runner, DecodeRunner), "on a GPU steps are graphs"
        scratch = engine.step_runner.scratch_slot
        verify = VerifyRunner(decoder, engine.pool, scratch)
        return cls(DraftRunner(decoder, engine.pool, verify, scratch))

    def begin(self, kv: RequestKV, rotary: RotaryTable) -> DecodeState:
        """Return the state of a request; nothing is copied."""
        return DecodeState(kv, rotary)

    def draft(
        self,
        states: Sequence[DecodeState],
        pending: Sequence[Sequence[int]],
        steps: int,
        drawn: DrawnSteps | None = None,
    ) -> list[DraftTree]:
        """Return a chain a request, as `DraftRunner` says."""
        return self._runner.draft(states, pending, steps, drawn)


class ModelDrafter:
    """Proposes what a model says.

    Args:
        name: the name that `--draft` takes.
        model: drafts.
        target: the engine that verifies.
        prompts: the prompts to draft from, given the request's; one branch of the tree each, at most `width`.
        width: most prompts.

    Raises:
        ConfigError: the two tokenizers differ.
    """

    def __init__(
        self, name: str, model: DraftModel, target: Engine, prompts: DraftPrompts = lambda prompt: [prompt],
        width: int = 1,
    ) -> None:  # fmt: skip
        _check_vocabulary(name, model.engine, target)
        self._name = name
        self._model = model
        self._target = target
        self._prompts = prompts
        self._width = width
        self._step_time = _StepTime()

    @property
    def name(self) -> str:
        """The name that `--draft` takes."""
        return self._name

    @property
    def has_probabilities(self) -> bool:
        """Tokens are drawn where the target's are."""
        return True

    @property
    def width(self) -> int:
        """One path a prompt."""
        return self._width

    def begin(self, context: DraftContext) -> ModelSession:
        """Return the state of one request; its prompts are computed here.

        Raises:
            CacheCapacityError: the pool has too few free blocks.
        """
        return ModelSession(self._model, self._target, self._prompts, context, self._step_time)

    @torch.inference_mode()
    def propose(self, sessions: Sequence[DraftSession], budgets: Sequence[DraftBudget]) -> list[DraftTree]:
        """Return a tree a request: the chains of its prompts side by side, drafted in common steps."""
        trees = [DraftTree()] * len(sessions)
        groups: dict[float, list[int]] = {}
        for index, session in enumerate(sessions):
            assert isinstance(session, ModelSession)
            if budgets[index].depth > 0 and session.paths:
                groups.setdefault(session.temperature, []).append(index)
        for temperature, indices in groups.items():
            members = [session for index in indices if isinstance(session := sessions[index], ModelSession)]
            chosen = [budgets[index] for index in indices]
            for index, tree in zip(indices, self._draft(members, chosen, temperature), strict=True):
                trees[index] = tree
        return trees

    def _draft(
        self, sessions: Sequence[ModelSession], budgets: Sequence[DraftBudget], temperature: float
    ) -> list[DraftTree]:
        started = time.perf_counter()
        paths = [path for session in sessions for path in session.paths]
        steps = min(MOST_STEPS, *(path.room for path in paths), max(budget.depth for budget in budgets))
        if steps < 1:
            return [DraftTree()] * len(sessions)
        drawn = None
        if temperature > 0:
            drawn = DrawnSteps(temperature, torch.cat([session.uniforms(steps) for session in sessions]))
        chains = iter(
            self._model.runner.draft([path.state for path in paths], [path.pending for path in paths], steps, drawn)
        )
        trees = []
        for session, budget in zip(sessions, budgets, strict=True):
            own = []
            for path in session.paths:
                chain = next(chains)
                path.note(chain.token_ids)
                own.append(self._widened(chain).cut(budget.nodes, budget.depth))
            trees.append(joined(own).cut(budget.nodes, budget.depth))
        self._step_time.note((time.perf_counter() - started) * 1e3 / steps)
        return trees

    def _widened(self, chain: DraftTree) -> DraftTree:
        """Return the chain with distributions over the target's ids, of which the model may know fewer."""
        missing = self._target.decoder.config.vocab_size - self._model.decoder.config.vocab_size
        if chain.probabilities is None or missing == 0:
            return chain
        padded = torch.nn.functional.pad(chain.probabilities, (0, missing))
        return DraftTree(chain.token_ids, chain.parents, padded)


class ModelSession:
    """The model's KV of one request.

    Args:
        model: drafts.
        target: the engine that verifies.
        prompts: the prompts to draft from.
        context: the request.
        step_time: what a step takes.

    Attributes:
        paths: one for each prompt; none where the model does not know all tokens.
        temperature: that tokens are drawn with; 0 takes the most likely ones.
    """

    def __init__(
        self, model: DraftModel, target: Engine, prompts: DraftPrompts, context: DraftContext, step_time: _StepTime
    ) -> None:
        self._model = model
        self._target = target
        self._prompts = prompts
        self._context = context
        sampling = context.sampling
        # A distribution is needed for transfer even where the target's own tokens are the most likely ones.
        self.temperature = sampling.temperature or float(context.needs_probabilities)
        self._generator = torch.Generator().manual_seed(sampling.seed ^ _SEED_OFFSET)
        self._step_time = step_time
        self._answer: list[int] = []
        self.paths: list[_Path] = []
        self._begin(context.prompt)

    @property
    def step_ms(self) -> float:
        """Measured milliseconds of a step."""
        return self._step_time.ms

    @property
    def step_share(self) -> float:
        """Bytes of a step of the drafter over those of a plain step of the target."""
        own = self._model.weight_bytes + sum(_kv_bytes(path.state.kv) for path in self.paths)
        target = self._target.decoder
        rows = len(self._context.prompt) * target.layout.bytes_per_token
        return own / (weight_bytes(target) + rows)

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

    def _path(self, prompt: Prompt, sampling: SamplingConfig) -> _Path:
        model = self._model
        window = model.engine.max_context
        total = min(len(prompt) + sampling.max_new_tokens + MOST_STEPS, window)
        if len(prompt) >= total:
            raise CacheCapacityError(
                f"a prompt of {len(prompt)} tokens leaves no room to draft in a window of {window}: draft from fewer "
                "chunks (draft.context_tokens)"
            )
        pool = model.engine.pool
        with ExitStack() as held:
            # Requests are not to find taken what they were let in for: an answer can do without drafts.
            spare = held.enter_context(model.engine.admission.spare(pool.blocks_for(total) + len(prompt.segments)))
            kv = held.enter_context(RequestKV(pool))
            rotary = model.engine.rotary.table(total, prompt_tokens=len(prompt))
            request = PrefillRequest(prompt, kv, rotary, answer_tokens=total - len(prompt))
            model.strategy.prefill(model.decoder, request)
            kv.reserve(total)
            spare.has_taken()
            return _Path(model.runner.begin(kv, rotary), total, held.pop_all())


class _Path:
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


class _StepTime:
    """What a step takes, measured over all requests of a drafter."""

    def __init__(self) -> None:
        self.ms = 0.0
        self._is_warm = False

    def note(self, ms: float) -> None:
        """Note the steps of a draft; those of the first may have compiled or recorded something and do not count."""
        if self._is_warm:
            known = self.ms or ms
            self.ms = known + _NEWEST * (min(ms, _OUTLIER * known) - known)
        self._is_warm = True


def _check_vocabulary(name: str, engine: Engine, target: Engine) -> None:
    if engine.tokenizer.tokenizer_id != target.tokenizer.tokenizer_id:
        raise ConfigError(
            f"{name} cannot draft for {target.model_name}: their tokenizers differ, and a draft is made of token ids; "
            "take a model of the same family, or draft with self or lookup"
        )
    own, theirs = engine.decoder.config.vocab_size, target.decoder.config.vocab_size
    if own > theirs:
        raise ConfigError(f"{name} has {own} token ids and {target.model_name} {theirs}: it may draft unknown ones")


def _kv_bytes(kv: RequestKV) -> int:
    return kv.num_tokens * kv.pool.layout.bytes_per_token


def weight_bytes(decoder: Decoder) -> int:
    """Return the bytes of weights that a step reads: all matrices, and one row of the embedding."""
    config = decoder.config
    heads = config.num_q_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_q_heads)
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    matrices = config.num_layers * (attention + feed_forward) + config.hidden_size * config.vocab_size
    return matrices * decoder.dtype.itemsize
