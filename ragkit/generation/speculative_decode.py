"""The decoding loop with drafts: propose, verify in one pass, accept, and go on behind what stood.

It takes the place of `ragkit.generation.decode`, and gives the same steps: the stream, stop tokens, the limit of tokens
and the rows that are left behind are those of plain decoding, whatever was drafted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from ragkit.errors import ConfigError, RagkitError
from ragkit.generation.acceptance import Acceptance, Transfer
from ragkit.generation.decode import Decoded
from ragkit.generation.decode_state import DecodeState, StepRunner
from ragkit.generation.draft_control import DraftController, DraftLimits
from ragkit.generation.draft_costs import Costs, NominalCosts
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import DraftBudget, DraftContext, Drafter, DraftSession
from ragkit.generation.sampling import SamplingConfig
from ragkit.generation.steps import FinishReason, GeneratedToken
from ragkit.generation.text_stream import TextStream
from ragkit.generation.verification import Verifier
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.setting_names import DraftMode
from ragkit.types import DraftUse, Prompt, TextTokenizer

FAILURES = (RagkitError, torch.OutOfMemoryError)  # that end drafts and nothing else: no answer depends on them

_log = logging.getLogger(__name__)
_LONGEST_REST = 64  # passes between two tries of what others' passes were not worth
_BEGUN_AGAIN = 48  # bits by which the seed of a session differs from that of the one before it


@dataclass(frozen=True, slots=True)
class Drafting:
    """How an answer is drafted.

    Attributes:
        drafter: what proposes tokens.
        transfer: the mode `transfer`, which needs a drafter with probabilities; None is `exact`.
        limits: bounds of one draft.
        retrieve: called with the tokens of the answer so far where acceptance falls; returns a prompt with other
            chunks to draft from, or None where there is none.
    """

    drafter: Drafter
    transfer: Transfer | None = None
    limits: DraftLimits = field(default_factory=DraftLimits)
    retrieve: Callable[[Sequence[int]], Prompt | None] | None = None

    def __post_init__(self) -> None:
        if self.transfer is not None and not self.drafter.has_probabilities:
            raise ConfigError(
                f"transfer moves the model towards its drafter's distribution, and {self.drafter.name} has none: draft "
                "with self or a model, or leave the mode exact"
            )

    @property
    def mode(self) -> DraftMode:
        """What it may do to the answer."""
        return DraftMode.EXACT if self.transfer is None else DraftMode.TRANSFER


class SpeculativeRequest:
    """One request while it decodes with drafts.

    Args:
        drafting: how.
        prompt: the whole prompt.
        sampling: how tokens are chosen.
        stop_token_ids: tokens that end the answer.
        costs: what passes cost on this engine.

    Attributes:
        costs: what lengths follow.
        warnings: what was not drafted, and why; then nothing is any more.
        state: what passes take, while it has rows.
        token_ids: the answer so far.
        reason: why it ended.
    """

    def __init__(
        self, drafting: Drafting, prompt: Prompt, sampling: SamplingConfig, stop_token_ids: frozenset[int], costs: Costs
    ) -> None:
        self.drafting = drafting
        self._sampling = sampling
        self._stops = stop_token_ids
        self._prompt = prompt
        self._acceptance = Acceptance(sampling, drafting.transfer)
        # Where the drafter draws tokens, or moves the target, the answer depends on lengths: not on the clock as well.
        draws = drafting.drafter.has_probabilities and (sampling.temperature > 0 or drafting.transfer is not None)
        width = drafting.drafter.width
        self.costs = NominalCosts() if draws else costs
        self._controller = DraftController(self.costs, drafting.limits, width, drafting.drafter.name)
        self._session: DraftSession | None = None
        self._is_declined = False  # as it cannot pay
        self._dropped = self._resting = 0  # drafts behind each other that were not verified, and passes without any
        self._begun = 0  # sessions so far
        self.warnings: tuple[str, ...] = ()
        self.state: DecodeState | None = None
        self.token_ids: list[int] = []
        self.reason: FinishReason | None = None
        self._drafted = self._accepted = self._passes = 0
        self._spent_ms = 0.0

    @property
    def last_token(self) -> int:
        """The token that the next pass begins with."""
        return self.token_ids[-1]

    @property
    def session(self) -> DraftSession:
        """The drafter's state, begun when it is first asked for."""
        if self._session is None:
            needs = self.drafting.transfer is not None
            # Another session draws other numbers: those of the first are in the answer already.
            sampling = replace(self._sampling, seed=self._sampling.seed ^ (self._begun << _BEGUN_AGAIN))
            self._session = self.drafting.drafter.begin(DraftContext(self._prompt, sampling, needs))
            self._session.accept(self.token_ids)
            self._begun += 1
        return self._session

    @property
    def is_drafting(self) -> bool:
        """Whether its drafter has a state."""
        return self._session is not None

    def first(self, logits: Tensor) -> list[int]:
        """Return the first token, [] where it ends the answer, for the prompt's logits (vocab_size,)."""
        return self._take([self._acceptance.first(logits)])

    def budget(self, requests: int = 1, room: int | None = None) -> DraftBudget:
        """Return how much to draft now, for a pass over so many requests; `room` is rows for nodes, reserved or not."""
        assert self.state is not None
        if self._resting:
            self._resting -= 1
            return DraftBudget(0, 0)
        if self.warnings or (self.drafting.transfer is None and self._controller.rests(requests)):
            return DraftBudget(0, 0)
        kv = self.state.kv
        remaining = self._sampling.max_new_tokens - len(self.token_ids)
        room = kv.num_reserved - kv.num_tokens - 1 if room is None else room
        if self._session is None and not self._may_begin(kv.num_tokens, remaining, requests):
            return DraftBudget(0, 0)
        try:
            session = self.session
        except FAILURES as error:
            self.give_up(error)
            return DraftBudget(0, 0)
        budget = self._controller.budget(
            kv.num_tokens, remaining, room, session.step_ms, session.step_share, requests, session.lag,
            session.first_ms, session.behind_ms,
        )  # fmt: skip
        # There it is done for the answer, whatever it costs.
        least = int(self.drafting.transfer is not None and min(remaining - 1, room) > 0)
        return budget if budget.depth >= least else DraftBudget(least, min(room, self.drafting.limits.nodes))

    def drop(self) -> None:
        """Note that what a model drafted was not worth a pass of all requests; it is tried again, ever more seldom."""
        self._dropped += 1
        self._resting = min(2**self._dropped, _LONGEST_REST)

    def cut(self, tree: DraftTree, budget: DraftBudget) -> DraftTree:
        """Return the part of a proposal that is verified."""
        assert self.state is not None
        return self._controller.cut(tree.cut(budget.nodes, budget.depth), self.state.kv.num_tokens)

    def chances(self, tree: DraftTree) -> list[float]:
        """Return how likely each node of a tree stands, by what became of others."""
        if tree.chances is not None and tree.probabilities is None:  # drawn tokens must not decide what is looked at
            return [min(1.0, self._controller.trust * chance) for chance in tree.chances]
        reached = list(accumulate(self._controller.acceptances(tree.depth), mul))
        return [reached[depth] for depth in tree.depths]

    def take(
        self, logits: Tensor, tree: DraftTree, verifier: Verifier | None, likeliest: Sequence[int] = ()
    ) -> list[int]:
        """Return the tokens that a pass brought, without the one that ends the answer.

        Args:
            logits: (nodes + 1, vocab_size) of the pass.
            tree: what it verified.
            verifier: did the pass; None where it was a plain step, which keeps its row itself.
            likeliest: the token with the highest logit of each row, where it is known.
        """
        assert self.state is not None
        nodes, token = self._acceptance.accept(logits, tree, likeliest)
        brought = [*(tree.token_ids[node] for node in nodes), token]
        taken = self._take(brought)
        if verifier is not None:
            verifier.commit(self.state, nodes[: len(taken)])
        self._drafted += len(tree)
        self._dropped = 0 if len(tree) else self._dropped
        self._accepted += len(nodes[: len(taken)])
        if self.reason is None and self._session is not None and not self.warnings:
            self._session.accept(taken)
        return taken

    def observe(self, tree: DraftTree, accepted: int, context: int, pass_ms: float, draft_ms: float) -> None:
        """Note what a pass took and how much of its tree stood; retrieve anew where drafts have become worse."""
        self._passes += 1
        self._spent_ms += pass_ms + draft_ms
        self._controller.observe(tree, accepted, context, pass_ms)
        is_drafting = self.reason is None and self._session is not None and not self.warnings
        if is_drafting and self._controller.wants_refresh:
            self._refresh(context)

    def use(self) -> DraftUse:
        """Return what drafting did."""
        return DraftUse(
            mode=self.drafting.mode.value,
            drafter=self.drafting.drafter.name,
            drafted=self._drafted,
            accepted=self._accepted,
            steps=self._passes,
            ms_per_step=self._spent_ms / max(1, self._passes),
        )

    def close(self) -> None:
        """Give the drafter's memory back; twice is harmless."""
        if self._session is not None:
            self._session.close()

    def pause(self) -> None:
        """Let go of all rows, its own and the drafter's; it goes on with its tokens when it has rows again."""
        self.close()
        self._session = self.state = None

    def give_up(self, reason: Exception | str) -> None:
        """Draft no more."""
        self.warnings = (f"drafting ended after {self._passes} steps: {reason}",)
        _log.warning("%s", self.warnings[0])
        self.close()

    def gives_way(self, pool: KVPool) -> bool:
        """Draft no more if the drafter's rows lie in blocks of `pool`; return whether they did."""
        if self.warnings or self._session is None or not self._session.holds_blocks_of(pool):
            return False
        self.give_up("other requests need the KV blocks of its drafter")
        return True

    def _may_begin(self, context: int, remaining: int, requests: int) -> bool:
        """Return whether drafting may pay. In `transfer` it is done for the answer, whatever it costs."""
        if self._is_declined:
            return False
        if self.drafting.transfer is None:
            price = self.drafting.drafter.price(self._prompt)
            reason = self._controller.reason_not_to_begin(price, context, remaining, requests)
            if reason:
                _log.info("not drafted by %s: %s", self.drafting.drafter.name, reason)
                self._is_declined = True
        return not self._is_declined

    def _refresh(self, context: int) -> None:
        """Retrieve anew, and draft from there, where that pays."""
        retrieve, started = self.drafting.retrieve, time.perf_counter()
        remaining = self._sampling.max_new_tokens - len(self.token_ids)
        price = self.drafting.drafter.price(self._prompt)
        if retrieve is None or not self._controller.pays_to_refresh(price, context, remaining):
            self._controller.refreshed()
            return
        try:
            prompt = retrieve(self.token_ids)
            if prompt is not None:
                self.session.refresh(prompt)
        except FAILURES as error:
            self.give_up(error)
        spent = (time.perf_counter() - started) * 1e3
        self._controller.refreshed(spent)
        self._spent_ms += spent

    def _take(self, tokens: Sequence[int]) -> list[int]:
        taken: list[int] = []
        for token in tokens:
            if token in self._stops:
                self.reason = FinishReason.STOP_TOKEN
                break
            taken.append(token)
            if len(self.token_ids) + len(taken) == self._sampling.max_new_tokens:
                self.reason = FinishReason.LENGTH
                break
        self.token_ids += taken
        return taken


def advance(requests: Sequence[SpeculativeRequest], runner: StepRunner, verifier: Verifier) -> list[list[int]]:
    """Return the tokens that one pass brings each of `requests`, all of which have a state and are not finished.

    A pass in which nothing is drafted is a plain step.
    """
    started = time.perf_counter()
    trees = _proposed(requests)
    began = time.perf_counter()
    states = [_state(request) for request in requests]
    contexts = [state.kv.num_tokens for state in states]
    tokens = [request.last_token for request in requests]
    drafted = any(len(tree) for tree in trees)
    logits = verifier.verify(states, tokens, trees) if drafted else list(runner.step(states, tokens).unsqueeze(1))
    brought = [
        request.take(rows, tree, verifier if drafted else None)
        for request, rows, tree in zip(requests, logits, trees, strict=True)
    ]
    ended = time.perf_counter()
    spent = (ended - began) * 1e3, (began - started) * 1e3
    for request, tree, context, state in zip(requests, trees, contexts, states, strict=True):
        request.observe(tree, state.kv.num_tokens - context - 1, context, *spent)
    return brought


def speculative_decode(
    request: SpeculativeRequest,
    runner: StepRunner,
    verifier: Verifier,
    kv: RequestKV,
    rotary: RotaryTable,
    logits: Tensor,
    tokenizer: TextTokenizer,
) -> Generator[GeneratedToken, None, Decoded]:
    """Yield one `GeneratedToken` a token and return how it ended, as `decode` does.

    Args:
        request: the request.
        runner, verifier: run steps and passes, over the same states.
        kv: its prompt in place, and rows reserved for all tokens that it may have.
        rotary: its rotary table.
        logits: (vocab_size,) after the prompt.
        tokenizer: turns tokens into text.
    """
    stream = TextStream(tokenizer)
    try:
        taken = request.first(logits)
        while True:
            for token in taken:
                yield GeneratedToken(token, stream.push(token))
            if request.reason is not None:
                return Decoded(stream.close(), request.reason, tuple(request.token_ids))
            if request.state is None:  # not before: it may copy the whole KV, which the first token need not wait for
                request.state = runner.begin(kv, rotary)
            (taken,) = advance([request], runner, verifier)
    finally:
        request.close()


def _proposed(requests: Sequence[SpeculativeRequest]) -> list[DraftTree]:
    """Return what is verified of each request; those with one drafter are drafted together."""
    budgets = [request.budget(len(requests)) for request in requests]
    trees = [DraftTree()] * len(requests)
    by_drafter: dict[int, list[int]] = {}
    for index, (request, budget) in enumerate(zip(requests, budgets, strict=True)):
        if budget.depth > 0:
            by_drafter.setdefault(id(request.drafting.drafter), []).append(index)
    for indices in by_drafter.values():
        drafter = requests[indices[0]].drafting.drafter
        try:
            proposals = drafter.propose([requests[i].session for i in indices], [budgets[i] for i in indices])
        except FAILURES as error:
            for index in indices:
                requests[index].give_up(error)
            continue
        for index, tree in zip(indices, proposals, strict=True):
            trees[index] = requests[index].cut(tree, budgets[index])
    return trees


def _state(request: SpeculativeRequest) -> DecodeState:
    assert request.state is not None, "a request has a state once its first token is out"
    return request.state
