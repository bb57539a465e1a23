"""Drafts without a model: what followed the answer's last tokens where the prompt or the answer held them before.

Prompt lookup (arXiv 2304.04487) over all chunks, the question and the answer so far, with the longest match instead of
a fixed one, and a tree of continuations by how often each followed (suffix decoding, arXiv 2411.04975). Which match is
worth how much is learned from every token of the answer, drafted or not.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ragkit.generation.draft_tree import ROOT, DraftTree
from ragkit.generation.drafter import DraftBudget, DraftContext, DraftPrice, DraftSession
from ragkit.generation.suffix_automaton import ROOT_STATE, SuffixAutomaton
from ragkit.kvcache.pool import KVPool
from ragkit.types import Prompt

# How often the most frequent continuation of a match of so many tokens was the next token, before anything is known of
# this answer: an answer that copies has long matches, and any two texts have short ones.
_PRIOR = (0.0, 0.2, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85)
_PRIOR_WEIGHT = 6.0  # tokens that the prior counts for
_FORGET = 0.97
_LEAST_CHANCE = 0.02  # continuations less likely than this are not proposed
_MOST_BRANCHES = 4  # continuations of one stretch


@dataclass(frozen=True, slots=True)
class LookupDrafter:
    """Proposes what followed before. Nothing is drawn: a request's tokens are those that it has without drafting."""

    @property
    def name(self) -> str:
        """The name that `--draft` takes."""
        return "lookup"

    @property
    def has_probabilities(self) -> bool:
        """Nothing is drawn."""
        return False

    @property
    def width(self) -> int:
        """Trees tell the chances of their nodes, which decide."""
        return 1

    def price(self, prompt: Prompt) -> DraftPrice:
        """Nothing."""
        return DraftPrice()

    def begin(self, context: DraftContext) -> LookupSession:
        """Return the state of one request: its prompt's segments, indexed in time proportional to their tokens."""
        return LookupSession(context.prompt)

    def propose(self, sessions: Sequence[DraftSession], budgets: Sequence[DraftBudget]) -> list[DraftTree]:
        """Return a tree a request, the most likely nodes first."""
        trees = []
        for session, budget in zip(sessions, budgets, strict=True):
            assert isinstance(session, LookupSession)
            trees.append(session.propose(budget))
        return trees


class LookupSession:
    """The texts of one request, and where the end of its answer occurred in them before.

    Args:
        prompt: its segments are texts of their own: nothing is continued from one into the next.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._texts = SuffixAutomaton(segment.token_ids for segment in prompt.segments)
        self._answer: list[int] = []
        self._state, self._length = ROOT_STATE, 0  # the longest stretch that the answer ends with
        levels = len(_PRIOR)
        self._hits = [chance * _PRIOR_WEIGHT for chance in _PRIOR]
        self._tries = [_PRIOR_WEIGHT] * levels

    @property
    def step_ms(self) -> float:
        """Nothing: a proposal takes microseconds, whatever its depth."""
        return 0.0

    @property
    def first_ms(self) -> float:
        """As `step_ms`."""
        return 0.0

    @property
    def behind_ms(self) -> float:
        """Texts grow as tokens come."""
        return 0.0

    @property
    def step_share(self) -> float:
        """No model runs."""
        return 0.0

    @property
    def lag(self) -> int:
        """Texts grow as tokens come."""
        return 0

    @property
    def match_length(self) -> int:
        """Tokens at the end of the answer that occurred before in this order."""
        return self._length

    def accept(self, token_ids: Sequence[int]) -> None:
        """Note the next tokens of the answer."""
        for token in token_ids:
            self._learn(token)
            self._state, self._length = self._texts.match(self._state, self._length, token)
            self._texts.append(token)
            self._state = self._texts.narrowed(self._state, self._length)
            self._answer.append(token)

    def refresh(self, prompt: Prompt) -> None:
        """Go on with further texts beside the prompt's own, which the model goes on to copy from."""
        answer, self._answer = self._answer, []
        hits, tries = [*self._hits], [*self._tries]
        texts = dict.fromkeys(segment.token_ids for segment in (*self._prompt.segments, *prompt.segments))
        self._texts = SuffixAutomaton(texts)
        self._state, self._length = ROOT_STATE, 0
        self.accept(answer)
        self._hits, self._tries = hits, tries  # noted when the answer came, not once more

    def holds_blocks_of(self, pool: KVPool) -> bool:
        """Return False: it has texts, and no rows."""
        return False

    def close(self) -> None:
        """Let the texts go."""
        self._texts = SuffixAutomaton()
        self._state, self._length = ROOT_STATE, 0

    def propose(self, budget: DraftBudget) -> DraftTree:
        """Return the continuations of the match, each parent before its children and the likelier nodes first."""
        token_ids: list[int] = []
        parents: list[int] = []
        chances: list[float] = []
        # (-chance, order, token, parent, its state, tokens matched before it)
        waiting: list[tuple[float, int, int, int, int, int]] = []
        order = 0
        if budget.depth > 0 and self._length > 0:
            order = self._expand(waiting, order, ROOT, self._state, self._length, 1.0)
        while waiting and len(token_ids) < budget.nodes:
            negative, _, token, parent, state, length = heapq.heappop(waiting)
            node = len(token_ids)
            token_ids.append(token)
            parents.append(parent)
            chances.append(-negative)
            if length - self._length < budget.depth:
                order = self._expand(waiting, order, node, state, length, -negative)
        return DraftTree(tuple(token_ids), tuple(parents), chances=tuple(chances))

    def _expand(
        self, waiting: list[tuple[float, int, int, int, int, int]], order: int, node: int, state: int,
        length: int, chance: float,
    ) -> int:  # fmt: skip
        count, last_end = self._texts.count, self._texts.last_end
        follows = self._texts.follows[state]
        total = sum(count[behind] for behind in follows.values())
        best = heapq.nlargest(_MOST_BRANCHES, follows.items(), key=lambda item: (count[item[1]], last_end[item[1]]))
        for rank, (token, behind) in enumerate(best):
            # The learned chance is that of the first; the others share what it leaves, by how often each followed.
            first = self._chance(length)
            share = count[behind] / total
            likely = chance * (first if rank == 0 else min(first, (1 - first) * share))
            if likely >= _LEAST_CHANCE:
                heapq.heappush(waiting, (-likely, order, token, node, behind, length + 1))
                order += 1
        return order

    def _chance(self, length: int) -> float:
        level = min(length, len(_PRIOR) - 1)
        return self._hits[level] / self._tries[level]

    def _learn(self, token: int) -> None:
        if self._length == 0:
            return
        follows = self._texts.follows[self._state]
        if not follows:
            return
        count, last_end = self._texts.count, self._texts.last_end
        first = max(follows, key=lambda one: (count[follows[one]], last_end[follows[one]]))
        level = min(self._length, len(_PRIOR) - 1)
        self._hits[level] = self._hits[level] * _FORGET + (token == first)
        self._tries[level] = self._tries[level] * _FORGET + 1
