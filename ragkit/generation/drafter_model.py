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
from ragkit.generation.draft_runner import MOST_STEPS, PENDING_BUCKETS, DraftRunner, DrawnSteps
from ragkit.generation.draft_tree import DraftTree, joined
from ragkit.generation.drafter import READ_AT_ONCE, DraftBudget, DraftContext, DraftPrice, DraftSession
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.strategy import PrefillRequest, PrefillStrategy
from ragkit.generation.verify_runner import VerifyRunner
from ragkit.generation.weight_bytes import weight_bytes
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.types import Prompt

if TYPE_CHECKING:
    from ragkit.generation.decoder import Decoder
    from ragkit.generation.engine import Engine

_REUSED = 0.75  # of a prompt that is blended from stored rows, before it was measured what that saves
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
        reader: the weights that the prompt's rows are computed with.
    """

    engine: Engine
    decoder: Decoder
    runner: ChainRunner
    strategy: PrefillStrategy
    weight_bytes: int
    reader: Decoder

    @classmethod
    def of(
        cls, engine: Engine, decoder: Decoder | None = None, strategy: PrefillStrategy | None = None,
        reader: Decoder | None = None,
    ) -> DraftModel:  # fmt: skip
        """Return the model of `engine`, or a variant of it; its prompts are computed in full by default.

        Args:
            engine: the model.
            decoder: a variant of its weights with KV of the same shape.
            strategy: brings prompts' rows into the pool.
            reader: computes them, and what a draft is far behind; the variant itself by default. Weights of 4 bits are
                made for few rows, and rows of the true weights serve them as well.
        """
        decoder = decoder or engine.decoder
        reader = reader or decoder
        on_gpu = decoder.device.type == "cuda"
        runner = GraphDraftRunner.of(engine, decoder, reader) if on_gpu else ContiguousDraftRunner(decoder)
        return cls(engine, decoder, runner, strategy or FullPrefill(), weight_bytes(decoder), reader)


@dataclass(frozen=True, slots=True)
class GraphDraftRunner:
    """Chains by CUDA graphs, over an engine's pool."""

    _runner: DraftRunner

    @classmethod
    def of(cls, engine: Engine, decoder: Decoder, reader: Decoder | None = None) -> GraphDraftRunner:
        """Return the runner of `decoder`, whose rows lie in the engine's pool, with what it will replay recorded."""
        assert isinstance(engine.step_runner, DecodeRunner), "on a GPU steps are graphs"
        scratch = engine.step_runner.scratch_slot
        verify = VerifyRunner(decoder, engine.pool, scratch, PENDING_BUCKETS)
        runner = DraftRunner(decoder, engine.pool, verify, scratch, reader)
        engine.record_ahead(runner.prepare)
        return cls(runner)

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
        self._step_time = _Time()
        self._begin_time = _Time()  # a token

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

    def price(self, prompt: Prompt) -> DraftPrice:
        """Return what a step over the prompts to draft from reads, and what is computed of them."""
        tokens = sum(map(len, self._prompts(prompt)))
        computed = tokens if self._model.strategy.name == FullPrefill().name else round(tokens * (1 - _REUSED))
        share = _step_share(self._model, self._target, tokens, len(prompt))
        return DraftPrice(self._step_time.ms, share, self._begin_time.ms * tokens, computed)

    def begin(self, context: DraftContext) -> ModelSession:
        """Return the state of one request; its prompts are computed here.

        Raises:
            CacheCapacityError: the pool has too few free blocks.
        """
        started = time.perf_counter()
        session = ModelSession(self._model, self._target, self._prompts, context, self._step_time)
        tokens = sum(path.state.kv.num_tokens for path in session.paths)
        if tokens:
            self._begin_time.note((time.perf_counter() - started) * 1e3 / tokens)
        return session

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
        pending = [path.pending for path in paths]
        passes = steps + any(len(tokens) > READ_AT_ONCE for tokens in pending)
        chains = iter(self._model.runner.draft([path.state for path in paths], pending, steps, drawn))
        trees = []
        for session, budget in zip(sessions, budgets, strict=True):
            own = []
            for path in session.paths:
                chain = next(chains)
                path.note(chain.token_ids)
                own.append(self._widened(chain).cut(budget.nodes, budget.depth))
            trees.append(joined(own).cut(budget.nodes, budget.depth))
        self._step_time.note((time.perf_counter() - started) * 1e3 / passes)
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
        self, model: DraftModel, target: Engine, prompts: DraftPrompts, context: DraftContext, step_time: _Time
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
        tokens = sum(path.state.kv.num_tokens for path in self.paths)
        return _step_share(self._model, self._target, tokens, len(self._context.prompt))

    @property
    def lag(self) -> int:
        """Tokens that its model has not read yet."""
        return max((len(path.pending) for path in self.paths), default=0)

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
            model.strategy.prefill(model.reader, request)
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


class _Time:
    """What something takes, measured over all requests of a drafter."""

    def __init__(self) -> None:
        self.ms = 0.0
        self._is_warm = False

    def note(self, ms: float) -> None:
        """Note a time; the first may have compiled or recorded something and does not count."""
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


def _step_share(model: DraftModel, target: Engine, tokens: int, target_tokens: int) -> float:
    """Return the bytes of a step behind so many tokens over those of a plain step of the target behind its own."""
    own = model.weight_bytes + tokens * model.decoder.layout.bytes_per_token
    return own / (weight_bytes(target.decoder) + target_tokens * target.decoder.layout.bytes_per_token)
