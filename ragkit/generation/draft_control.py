"""How much is drafted: what brings most tokens a millisecond, by measured acceptance and measured costs of steps.

With a_d the chance that a draft of depth d stands once those before it do, a chain of n brings 1 + sum_d a_1 ... a_d
tokens for n steps of the drafter and one pass over n + 1 rows (arXiv 2211.17192, section 3.3, with measured costs
instead of constants). A drafter that cannot pay is not begun. Where no n brings more than plain steps nothing is
drafted but single tokens now and then. What drafts of a model lose, probes or not, is kept account of: above a
hundredth of the answer only drafts go on that promise much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ragkit.errors import ConfigError
from ragkit.generation.draft_costs import Costs
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import MOST_RECORDED, READ_AT_ONCE, DraftBudget, DraftPrice

_FORGET = 0.96  # of acceptance, a pass
_FORGET_FAST, _FORGET_SLOWLY = 0.9, 0.98
_PRIOR_TRIES = 6.0  # that what is known of other answers counts for
_PRIOR_TRUST = 4.0  # nodes that a drafter's own chances are believed for
_GAIN = 1.02  # of what drafting must bring before it is begun; it goes on as long as it loses nothing
_WORTH_BEGINNING = 1.03  # of what a drafter must be able to bring whose prompt is to be read
_GAIN_IN_DEBT = 1.05  # of what drafting must promise that has lost more than it may
_PROBES = 0.01  # of an answer that may be lost by drafting
_AT_FIRST = 0.02  # of it, that may be lost while its first tokens show how drafts fare
_USUAL_ANSWER = 128  # tokens that what an answer's drafting costs once must be won back in
_MOST_ALLOWED, _MOST_OWED = 4.0, 1.0  # plain steps that may be lost at once, and that are remembered as lost
_MOST_EARNED = 2.0  # of those that may be lost, by drafts that stood
_REST = 8  # most passes in which a decision not to draft holds: taking it anew costs the host time
_FALL = 0.25  # of acceptance, below what it was, before anew is retrieved
_REFRESH_TOKENS = 48  # between two retrievals


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Bounds of one draft.

    Attributes:
        depth: most tokens behind each other.
        nodes: most tokens in all branches together.
        length: a depth to draft always, for measurements; 0 adapts it.
    """

    depth: int = 16
    nodes: int = 31
    length: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.depth <= self.nodes):
            raise ConfigError(f"drafts need 1 <= depth <= nodes, got depth {self.depth} and nodes {self.nodes}")
        if not 0 <= self.length <= self.depth:
            raise ConfigError(f"the length of drafts must be 0 or at most their depth {self.depth}, got {self.length}")


class DraftController:
    """Decides for one request, from what became of its drafts.

    Args:
        costs: what passes cost.
        limits: bounds.
        width: paths that the drafter proposes beside each other.
        drafter: its name, under which others' drafts are remembered.
    """

    def __init__(self, costs: Costs, limits: DraftLimits, width: int = 1, drafter: str = "") -> None:
        self._costs = costs
        self._limits = limits
        self._width = width
        self._record = costs.record(drafter)
        prior = self._record.acceptance
        self._hits = [prior * _PRIOR_TRIES] + [0.0] * (limits.depth - 1)
        self._tries = [_PRIOR_TRIES] + [0.0] * (limits.depth - 1)
        self._prior = prior
        self._stood = self._hoped = _PRIOR_TRUST  # nodes that stood, and that should have by the drafter's own chances
        self._allowed: float | None = None  # plain steps that may be lost
        self._probing = False
        self._is_paying = False
        self._rest = 0  # passes in which nothing is drafted
        # What the first token of a draft costs, each further one, and what is read beforehand.
        self._first = self._draft = self._behind = 0.0
        self._recent = self._usual = prior
        self._since_refresh = 0
        self._requests = 1

    def reason_not_to_begin(self, price: DraftPrice, context: int, remaining: int, requests: int = 1) -> str:
        """Return why a drafter of this price would not win back its steps; "" where it may.

        Args:
            price: what it costs, by what was measured or is read.
            context: tokens before.
            remaining: tokens that the answer may still have.
            requests: how many a pass is of.
        """
        steps = self._steps(price.first_ms, price.step_ms, price.step_share, context, requests)
        if self._limits.length or not any(steps):
            return ""
        gain = self._gain(context, steps, 1.0, requests)
        if gain <= _WORTH_BEGINNING:
            return f"even if all of its tokens stood, the answer would come {gain:.2f} times as fast"
        hope = self._record.hope
        likely = self._gain(context, steps, hope, requests)
        if likely <= _WORTH_BEGINNING:
            return f"with {hope:.2f} of its tokens standing, the answer would come {likely:.2f} times as fast"
        begin = self._in_steps(price.begin_ms, price.begin_tokens * self._costs.prefill_share, context, requests)
        saved = min(remaining, _USUAL_ANSWER) * (1 - 1 / likely)
        if saved <= begin:
            return f"it would save {saved:.1f} of the answer's steps, and reading its prompt takes {begin:.1f}"
        return ""

    def expected_speed(self, price: DraftPrice, context: int, remaining: int) -> float:
        """Return how many times as fast as plain steps an answer should come, its drafter's prompt to be read first."""
        tokens = min(remaining, _USUAL_ANSWER)
        steps = self._steps(price.first_ms, price.step_ms, price.step_share, context, 1)
        begin = self._in_steps(price.begin_ms, price.begin_tokens * self._costs.prefill_share, context, 1)
        return tokens / (tokens / self._gain(context, steps, self._record.acceptance, 1) + begin)

    def rests(self, requests: int = 1) -> bool:
        """Return whether it was decided lately that nothing is drafted, which holds for this pass as well."""
        if self._rest < 1 or requests != self._requests:
            return False
        self._rest -= 1
        self._probing = False
        return True

    def budget(
        self, context: int, remaining: int, room: int, step_ms: float = 0.0, share: float = 0.0, requests: int = 1,
        lag: int = 0, first_ms: float = 0.0, behind_ms: float = 0.0,
    ) -> DraftBudget:  # fmt: skip
        """Return how much to draft now.

        Args:
            context: tokens before.
            remaining: tokens that the answer may still have, of which the pass itself brings one.
            room: rows that are free for nodes.
            step_ms, share: what a step of the drafter takes, as its session says.
            requests: how many the pass is of.
            lag: tokens that the drafter has not read yet.
            first_ms, behind_ms: what a draft of one token takes, and reading many tokens beforehand, as step_ms.
        """
        self._requests, self._probing, self._rest = requests, False, 0
        if self._allowed is None:
            self._allowed = _AT_FIRST * min(remaining, _USUAL_ANSWER)
        limits = self._limits
        nodes = min(limits.nodes, room)
        depth = min(limits.depth, remaining - 1, max(nodes // self._width, min(nodes, 1)))
        if depth < 1:
            return DraftBudget(0, 0)
        self._first, self._draft = self._steps(first_ms, step_ms, share, context, requests)
        if limits.length:
            return DraftBudget(min(depth, limits.length), nodes)
        if self._first <= 0:  # drafts that cost nothing are cut when they are there
            return DraftBudget(depth, nodes)
        self._behind = self._catch_up(lag, behind_ms, context)
        best = self._best_depth(context, depth, min(remaining, _USUAL_ANSWER))
        if best == 0:
            cost = self._behind + self._first + self._costs.of_pass(context, self._width, requests)
            missing = cost / self._costs.of_pass(context, 0, requests) - 1 - self._allowed
            self._probing = missing <= 0
            self._rest = min(_REST, math.ceil(missing / _PROBES) - 1) if missing > 0 else 0
            best = int(self._probing)
        return DraftBudget(best, nodes if best else 0)

    def cut(self, tree: DraftTree, context: int) -> DraftTree:
        """Return the part of `tree` that is worth verifying; for trees that tell their nodes' chances."""
        if tree.chances is None or self._limits.length or not len(tree):
            return tree
        trust, requests = self.trust, self._requests
        plain = self._costs.of_pass(context, 0, requests)
        best, rate = 0, (1.0 if self._is_paying else _GAIN) / plain
        gains = accumulate((trust * chance for chance in tree.chances), initial=1.0)
        for nodes, gain in enumerate(gains):
            here = gain / self._costs.of_pass(context, nodes, requests) if nodes else 0.0
            if here > rate:
                best, rate = nodes, here
        self._is_paying = best > 0
        if best == 0:
            one = self._costs.of_pass(context, 1, requests) / plain
            # By its own chances it would pay: whether they are as wrong as they were is worth a try now and then.
            self._probing = (1 + tree.chances[0]) / one > _GAIN and one - 1 <= (self._allowed or 0.0)
            best = int(self._probing)
        return tree.cut(best, tree.depth)

    def observe(self, tree: DraftTree, accepted: int, context: int, ms: float) -> None:
        """Note that a pass over `tree` took `ms` and that `accepted` of its tokens, behind each other, stood."""
        self._costs.note(context, len(tree), ms, self._requests)
        self._since_refresh += accepted + 1
        plain = self._costs.of_pass(context, 0, self._requests)
        steps = 1.0
        if len(tree):
            drafts = self._behind + self._first + (tree.depth - 1) * self._draft
            steps = (drafts + self._costs.of_pass(context, len(tree), self._requests)) / plain
        self._record.note(tree.depth, accepted, steps)
        is_charged = self._probing or (len(tree) > 0 and self._first > 0)
        allowed = self._allowed or 0.0
        if is_charged:
            after = allowed + accepted + 1 - steps
            self._allowed = max(-_MOST_OWED, min(after, max(allowed, _MOST_EARNED)))
        else:
            self._allowed = min(_MOST_ALLOWED, allowed + _PROBES)
        if not len(tree):
            return
        for depth in range(min(accepted + 1, tree.depth)):
            self._hits[depth] = self._hits[depth] * _FORGET + (depth < accepted)
            self._tries[depth] = self._tries[depth] * _FORGET + 1
        if tree.chances is not None:
            self._stood = self._stood * _FORGET_SLOWLY + accepted
            self._hoped = self._hoped * _FORGET_SLOWLY + sum(tree.chances)
        first = float(accepted > 0)
        self._recent += (1 - _FORGET_FAST) * (first - self._recent)
        self._usual += (1 - _FORGET_SLOWLY) * (first - self._usual)

    @property
    def trust(self) -> float:
        """What the chances that a tree tells are worth: nodes that stood over those that should have."""
        return self._stood / self._hoped

    @property
    def wants_refresh(self) -> bool:
        """Whether acceptance has fallen below what it was, so that something else should be drafted from."""
        return self._since_refresh >= _REFRESH_TOKENS and self._recent < self._usual - _FALL

    def pays_to_refresh(self, price: DraftPrice, context: int, remaining: int) -> bool:
        """Return whether drafting as well as before would win back what retrieving and reading anew take."""
        steps = self._steps(price.first_ms, price.step_ms, price.step_share, context, self._requests)
        now, before = (max(1.0, self._gain(context, steps, one, self._requests)) for one in (self._recent, self._usual))
        begin = price.begin_tokens * self._costs.prefill_share
        cost = self._in_steps(self._record.refresh_ms, begin, context, self._requests)
        return min(remaining, _USUAL_ANSWER) * (1 / now - 1 / before) > cost

    def refreshed(self, ms: float = 0.0) -> None:
        """Note that something else is drafted from now, which took `ms`; 0 where nothing was tried."""
        self._since_refresh = 0
        self._usual = self._recent
        if ms > 0:
            self._record.note_refresh(ms)

    def acceptance(self, depth: int) -> float:
        """Return the chance that a token of `depth` stands once those before it do."""
        return self.acceptances(depth + 1)[depth]

    def acceptances(self, count: int) -> list[float]:
        """Return `acceptance` of the first `count` depths."""
        # What little is known of a depth weighs against what is known of the one before.
        known, chances = self._prior, []
        for hits, tries in zip(self._hits[:count], self._tries[:count], strict=True):
            known = (hits + known) / (tries + 1)
            chances.append(known)
        return chances

    def _steps(self, first_ms: float, step_ms: float, share: float, context: int, requests: int) -> tuple[float, float]:
        """Return what the first token of a draft costs and each further one, which is no dearer before it is known."""
        first = self._costs.of_draft(first_ms or step_ms, share, context, requests)
        return first, self._costs.of_draft(step_ms, share, context, requests) if step_ms else min(
            first, self._costs.of_draft(0.0, share, context, requests)
        )

    def _catch_up(self, lag: int, behind_ms: float, context: int) -> float:
        """Return what it costs to read `lag` tokens before a draft, beside the one or two that each draft reads."""
        read = self._first * max(0, lag - 2) * self._costs.prefill_share
        if lag <= MOST_RECORDED:
            return read + self._first * (max(0, lag - 1) // READ_AT_ONCE)
        return max(read, self._costs.of_draft(behind_ms, self._costs.catch_up, context, self._requests))

    def _in_steps(self, ms: float, share: float, context: int, requests: int) -> float:
        return self._costs.of_draft(ms, share, context, requests) / self._costs.of_pass(context, 0, requests)

    def _gain(self, context: int, steps: tuple[float, float], acceptance: float, requests: int) -> float:
        """Return how many times as fast as plain steps the best length is at one acceptance."""
        plain, (first, further) = self._costs.of_pass(context, 0, requests), steps
        most = max(1, min(self._limits.depth, self._limits.nodes // self._width))
        return max(
            expected_tokens(acceptance, depth)
            * plain
            / (first + (depth - 1) * further + self._costs.of_pass(context, depth * self._width, requests))
            for depth in range(1, most + 1)
        )

    def _best_depth(self, context: int, most: int, usual: int) -> int:
        plain = self._costs.of_pass(context, 0, self._requests)
        least = _GAIN_IN_DEBT if (self._allowed or 0.0) < 0 else 1.0 if self._is_paying else _GAIN
        best, rate = best_length(
            self.acceptances(most),
            lambda depth: (
                self._first
                + (depth - 1) * self._draft
                + self._costs.of_pass(context, depth * self._width, self._requests)
            ),
            least / plain,
        )
        # What it is behind by must be won back in the tokens that an answer still has.
        if best and usual * (1 - 1 / (rate * plain)) <= self._behind / plain:
            best = 0
        self._is_paying = best > 0
        return best


def best_length(
    acceptances: Sequence[float], cost: Callable[[int], float], rate: float
) -> tuple[int, float]:  # fmt: skip
    """Return the length that brings most tokens a cost, and how many; 0 and `rate` where none brings more than that.

    Args:
        acceptances: of each depth, once those before it stand.
        cost: of a draft of a length and the pass over it.
        rate: what plain steps bring.
    """
    tokens, reached, best = 1.0, 1.0, 0
    for depth, acceptance in enumerate(acceptances, start=1):
        reached *= acceptance
        tokens += reached
        here = tokens / cost(depth)
        if here > rate:
            best, rate = depth, here
    return best, rate


def expected_tokens(acceptance: float, length: int) -> float:
    """Return (1 - a^(n + 1)) / (1 - a), tokens that a pass over a chain of n brings (arXiv 2211.17192, equation 1)."""
    if not 0 <= acceptance <= 1:
        raise ConfigError(f"acceptance must lie in [0, 1], got {acceptance}")
    return float(length + 1) if math.isclose(acceptance, 1) else (1 - acceptance ** (length + 1)) / (1 - acceptance)
