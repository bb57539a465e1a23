"""Drafts of a language model: another one with the same tokenizer, or the target itself over a shorter prompt.

A session keeps the model's own KV of the request: one chain of tokens for each prompt that it drafts from, all drafted
in the same steps and verified side by side as one tree.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ragkit.errors import ConfigError
from ragkit.generation.draft_model import DraftModel
from ragkit.generation.draft_runner import MOST_STEPS, DrawnSteps
from ragkit.generation.draft_times import DraftTime, StepTimes
from ragkit.generation.draft_tree import DraftTree, joined
from ragkit.generation.drafter import DraftBudget, DraftContext, DraftPrice, DraftSession
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.known_ids import KnownIdsDecoder
from ragkit.generation.model_session import DraftPrompts, ModelSession
from ragkit.types import Prompt

if TYPE_CHECKING:
    from ragkit.generation.engine import Engine

REUSED = 0.75  # of a prompt that is blended from stored rows, before it was measured what that saves


class ModelDrafter:
    """Proposes what a model says.

    Args:
        name: the name that `--draft` takes.
        model: drafts.
        target: the engine that verifies.
        prompts: the prompts to draft from, given the request's; one branch of the tree each, at most `width`.
        width: most prompts.

    Raises:
        ConfigError: the two tokenizers differ, or the model may draft ids that the target does not have (see
            `model_drafter`).
    """

    def __init__(
        self, name: str, model: DraftModel, target: Engine, prompts: DraftPrompts = lambda prompt: [prompt],
        width: int = 1,
    ) -> None:  # fmt: skip
        _check_vocabulary(name, model, target)
        self._name = name
        self._model = model
        self._target = target
        self._prompts = prompts
        self._width = width
        self._times = StepTimes()
        self._begin_time = DraftTime()  # a token

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
        computed = tokens if self._model.strategy.name == FullPrefill().name else round(tokens * (1 - REUSED))
        share = self._model.step_share(self._target, tokens, len(prompt))
        times = self._times
        return DraftPrice(times.step_ms, share, self._begin_time.ms * tokens, computed, times.first_ms)

    def begin(self, context: DraftContext) -> ModelSession:
        """Return the state of one request; its prompts are computed here.

        Raises:
            CacheCapacityError: the pool has too few free blocks.
        """
        started = time.perf_counter()
        session = ModelSession(self._model, self._target, self._prompts, context, self._times)
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
            # One whose window ends drafts no more; the others do.
            if budgets[index].depth > 0 and session.has_room:
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
        chains = iter(self._model.runner.draft([path.state for path in paths], pending, steps, drawn))
        trees = []
        behind = max(map(len, pending))
        for session, budget in zip(sessions, budgets, strict=True):
            own = []
            for path in session.paths:
                chain = next(chains)
                path.note(chain.token_ids)
                own.append(self._widened(chain).cut(budget.nodes, budget.depth))
            trees.append(joined(own).cut(budget.nodes, budget.depth))
        self._times.note(steps, (time.perf_counter() - started) * 1e3, behind)
        return trees

    def _widened(self, chain: DraftTree) -> DraftTree:
        """Return the chain with distributions over the target's ids, of which the model may know fewer."""
        missing = self._target.decoder.config.vocab_size - self._model.decoder.config.vocab_size
        if chain.probabilities is None or missing == 0:
            return chain
        padded = torch.nn.functional.pad(chain.probabilities, (0, missing))
        return DraftTree(chain.token_ids, chain.parents, padded)


def model_drafter(name: str, engine: Engine, target: Engine) -> ModelDrafter:
    """Return the drafter that another model is, over those ids that the target has as well.

    Args:
        name: the name that `--draft` takes.
        engine: the model.
        target: the engine that verifies.

    Raises:
        ConfigError: the two tokenizers differ.
    """
    _check_tokenizer(name, engine, target)
    known = target.decoder.config.vocab_size
    narrowed = KnownIdsDecoder(engine.decoder, known) if engine.decoder.config.vocab_size > known else None
    return ModelDrafter(name, DraftModel.of(engine, narrowed), target)


def _check_vocabulary(name: str, model: DraftModel, target: Engine) -> None:
    _check_tokenizer(name, model.engine, target)
    own, theirs = model.decoder.config.vocab_size, target.decoder.config.vocab_size
    if own > theirs:
        raise ConfigError(
            f"{name} may draft {own} token ids, of which {target.model_name} has {theirs}: draft by a KnownIdsDecoder"
        )


def _check_tokenizer(name: str, engine: Engine, target: Engine) -> None:
    if not engine.tokenizer.agrees_with(target.tokenizer):
        raise ConfigError(
            f"{name} cannot draft for {target.model_name}: their tokenizers differ, and a draft is made of token ids; "
            "take a model of the same family, or draft with self or lookup"
        )
