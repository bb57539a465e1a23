"""Drafters over random weights, and what is imposed to stand of their drafts: for `speculative_speed.py`."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from ragkit.generation.acceptance import Accepted
from ragkit.generation.decode_state import DecodeState
from ragkit.generation.draft_runner import DraftRunner
from ragkit.generation.draft_times import StepTimes
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import DraftBudget, DraftContext, DraftPrice
from ragkit.kvcache.pool import KVPool
from ragkit.types import Prompt

MOST_DEPTH = 16
_SHARE_HOLDS_IN = 40  # tokens that are looked at


class Stands:
    """Says how many drafted tokens stand: each with one chance, or as on real weights.

    Of every 40 tokens that are looked at the chance's share stands, in random order: an answer of a hundred tokens
    would else have another acceptance than was imposed.

    Args:
        chance: of a token whose predecessors stand.
        runs: tokens proposed and standing in pass after pass; what was not drafted of a run stands in the next pass.
    """

    def __init__(self, chance: float = 0.0, runs: Sequence[Sequence[int]] = ()) -> None:
        self._chance = chance
        self._runs = runs
        self._next = 0
        self._left: int | None = None
        self._random = random.Random(0)
        self._drawn: list[bool] = []

    @property
    def proposed(self) -> int:
        """Tokens that a drafter finds now."""
        if not self._runs:
            return MOST_DEPTH
        return self._runs[self._next % len(self._runs)][0] if self._left is None else self._left

    def of(self, drafted: int) -> int:
        """Return how many of the first `drafted` tokens stand, and go on to the next pass."""
        if self._runs:
            run = self._runs[self._next % len(self._runs)][1] if self._left is None else self._left
            self._next += self._left is None
            left = run - drafted - 1  # the token behind a draft that stands is one of the run
            self._left = left if left > 0 else None
            return min(run, drafted)
        stands = 0
        while stands < drafted and self._draw():
            stands += 1
        return stands

    def _draw(self) -> bool:
        if not self._drawn:
            standing = round(self._chance * _SHARE_HOLDS_IN)
            self._drawn = [at < standing for at in range(_SHARE_HOLDS_IN)]
            self._random.shuffle(self._drawn)
        return self._drawn.pop()

    @property
    def chances(self) -> list[float]:
        """How likely the draft of each depth stands, all before it having to as well."""
        if not self._runs:
            return [self._chance**depth for depth in range(1, MOST_DEPTH + 1)]
        return [sum(run >= depth for _, run in self._runs) / len(self._runs) for depth in range(1, MOST_DEPTH + 1)]

    @property
    def expected(self) -> list[float]:
        """Tokens that a pass over a draft of 0, 1, 2 ... tokens brings."""
        return list(accumulate(self.chances, initial=1.0))


class ImposedAcceptance:
    """Chooses every token as decoding does, and then lets stand what it was told."""

    def __init__(self, stands: Stands) -> None:
        self._stands = stands
        self.looked_at = 0  # drafted tokens that stood, and of each draft the first that fell

    def first(self, logits: Tensor) -> int:
        """Return the first token."""
        return int(logits.argmax())

    def accept(self, logits: Tensor, tree: DraftTree, likeliest: Sequence[int] = ()) -> Accepted:
        """Return so many nodes of the chain, and the model's token behind them."""
        tokens = list(likeliest) or logits.argmax(-1).tolist()
        stands = self._stands.of(len(tree))
        self.looked_at += min(stands + 1, len(tree))
        return Accepted(tuple(range(stands)), tokens[stands])


class ModelSession:
    """A drafter's request over a short context of random rows."""

    def __init__(self, state: DecodeState, context: int, step_share: float, times: StepTimes) -> None:
        self.step_share = step_share
        self._times = times
        self.state = state
        state.kv.num_tokens = context
        self.pending: list[int] = []
        self.drafted: tuple[int, ...] = ()

    @property
    def step_ms(self) -> float:
        """Of one more token."""
        return self._times.step_ms

    @property
    def first_ms(self) -> float:
        """Of a draft of one token."""
        return self._times.first_ms

    @property
    def behind_ms(self) -> float:
        """Of reading what it is far behind."""
        return self._times.behind_ms

    def accept(self, token_ids: Sequence[int]) -> None:
        """Keep the rows of drafted tokens that stood; the last token is to be read in any case."""
        stood = 0
        for token, drafted in zip(token_ids[:-1], self.drafted[:-1], strict=False):  # the last draft has no row
            if token != drafted:
                break
            stood += 1
        if not self.pending:
            self.state.kv.num_tokens += stood
            token_ids = token_ids[stood:]
        self.pending += token_ids
        self.drafted = ()

    @property
    def lag(self) -> int:
        """Tokens that are read with the next draft."""
        return len(self.pending)

    def holds_blocks_of(self, pool: KVPool) -> bool:
        """They are not a request's here."""
        return False

    def refresh(self, prompt: Prompt) -> None:
        """Nothing is retrieved here."""

    def close(self) -> None:
        """Rows are used again."""


class ModelDrafter:
    """Greedy chains of a model.

    Args:
        name: under which its drafts are remembered.
        runner, state: draft them.
        context: tokens that they are drafted behind.
        step_share: bytes of a step over those of a step of the target.
        times: what its drafts take, of all requests so far.
    """

    has_probabilities = False
    width = 1

    def __init__(
        self, name: str, runner: DraftRunner, state: DecodeState, context: int, step_share: float, times: StepTimes
    ) -> None:
        self.name = name
        self._times = times
        self._runner = runner
        self._state = state
        self._context = context
        self._step_share = step_share
        self.begun = False

    def price(self, prompt: Prompt) -> DraftPrice:
        """Return what a step reads; its prompt's rows are there."""
        return DraftPrice(self._times.step_ms, self._step_share, first_ms=self._times.first_ms)

    def begin(self, context: DraftContext) -> ModelSession:
        """Return a session at the end of the short context."""
        self.begun = True
        return ModelSession(self._state, self._context, self._step_share, self._times)

    def propose(self, sessions: Sequence[ModelSession], budgets: Sequence[DraftBudget]) -> list[DraftTree]:
        """Return a chain for the one session."""
        session, depth = sessions[0], budgets[0].depth
        started = time.perf_counter()
        (chain,) = self._runner.draft([session.state], [session.pending], depth)
        self._times.note(depth, (time.perf_counter() - started) * 1e3, len(session.pending))
        session.pending, session.drafted = [], chain.token_ids
        return [chain]


class LookupSession:
    """A request whose drafts cost nothing."""

    first_ms = step_ms = behind_ms = step_share = 0.0
    lag = 0

    def accept(self, token_ids: Sequence[int]) -> None:
        """Nothing is looked up here."""

    def refresh(self, prompt: Prompt) -> None:
        """Nothing is retrieved here."""

    def holds_blocks_of(self, pool: KVPool) -> bool:
        """There are none."""
        return False

    def close(self) -> None:
        """There is nothing to give back."""


class LookupDrafter:
    """Chains of any tokens, with true chances."""

    has_probabilities = False
    width = 1

    def __init__(self, name: str, stands: Stands) -> None:
        self.name = name
        self._stands = stands
        self.begun = False

    def price(self, prompt: Prompt) -> DraftPrice:
        """Return nothing."""
        return DraftPrice()

    def begin(self, context: DraftContext) -> LookupSession:
        """Return a session."""
        self.begun = True
        return LookupSession()

    def propose(self, sessions: Sequence[LookupSession], budgets: Sequence[DraftBudget]) -> list[DraftTree]:
        """Return a chain a session."""
        chances = self._stands.chances
        lengths = [min(budget.depth, self._stands.proposed) for budget in budgets]
        return [
            dataclasses.replace(DraftTree.chain([7] * length), chances=tuple(chances[:length])) for length in lengths
        ]
