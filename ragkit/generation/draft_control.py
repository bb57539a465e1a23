"""How much is drafted: what brings most tokens a millisecond, by measured acceptance and measured costs of steps.

With a_d the chance that a draft of depth d stands once those before it do, a chain of n brings 1 + sum_d a_1 ... a_d
tokens for n steps of the drafter and one pass over n + 1 rows (arXiv 2211.17192, section 3.3, with measured costs
instead of constants). Where no n brings more than plain steps do nothing is drafted, until a probe now and then.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from ragkit.errors import ConfigError
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import DraftBudget

_NODES = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)  # how many are told apart in what a pass costs
_NEWEST = 0.2  # say of the newest pass in what a pass costs
_OUTLIER = 3.0  # a pass that took so many times what is known counts as this
# Of a plain step: what a node is taken to cost before it was measured. A CPU computes where a GPU waits for memory.
_UNKNOWN_NODE = {"cpu": 0.08, "cuda": 0.02}
_NOMINAL_NODE = 0.02
_FORGET = 0.9  # of acceptance, a pass
_FORGET_SLOWLY = 0.98
_PRIOR_ACCEPTANCE = 0.7
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 256  # plain steps between probes
_PROBE_DEPTH = 2
_GAIN = 1.02  # of what drafting must bring before it is done
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


class Costs(Protocol):
    """What passes cost, in milliseconds or in plain steps."""

    def of_pass(self, context: int, nodes: int, requests: int = 1) -> float:
        """Return the cost of verifying `nodes` behind `context` tokens, of each request; no node is a plain step."""
        ...

    def of_draft(self, measured_ms: float, share: float) -> float:
        """Return the cost of a step of the drafter, which took `measured_ms` and reads `share` of a plain step."""
        ...

    def note(self, context: int, nodes: int, ms: float, requests: int = 1) -> None:
        """Note a pass."""
        ...


class MeasuredCosts:
    """Milliseconds as they were measured, on one engine for all its requests. Safe to use from threads.

    Args:
        device: cpu or cuda, which says what to expect before anything is known.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._node = _UNKNOWN_NODE[device]
        self._lock = threading.Lock()
        self._known: dict[tuple[int, int, int], float] = {}
        self._seen: set[tuple[int, int, int]] = set()

    def of_pass(self, context: int, nodes: int, requests: int = 1) -> float:
        """Return milliseconds; between measured numbers of nodes by a line, in plain steps where nothing is known."""
        sizes = context.bit_length(), requests.bit_length()
        known = [(count, self._known[*sizes, count]) for count in _NODES if (*sizes, count) in self._known]
        if not known:
            return 1.0 + self._node * nodes
        below = [one for one in known if one[0] <= nodes]
        above = [one for one in known if one[0] >= nodes]
        if below and above:
            (low, start), (high, stop) = below[-1], above[0]
            return start if low == high else start + (stop - start) * (nodes - low) / (high - low)
        nearest, ms = below[-1] if below else above[0]
        return ms * (1 + self._node * nodes) / (1 + self._node * nearest)

    def of_draft(self, measured_ms: float, share: float) -> float:
        """Return milliseconds; `share` says nothing that the clock does not."""
        return measured_ms

    def note(self, context: int, nodes: int, ms: float, requests: int = 1) -> None:
        """Note a pass; the first of its kind may have compiled or recorded something and does not count."""
        cell = (context.bit_length(), requests.bit_length(), _bucket(nodes))
        with self._lock:
            if cell not in self._seen:
                self._seen.add(cell)
                return
            known = self._known.get(cell, ms)
            self._known[cell] = known + _NEWEST * (min(ms, _OUTLIER * known) - known)


class NominalCosts:
    """Plain steps, by the bytes that are read: the same on every machine, so that seeds give the same answers."""

    def of_pass(self, context: int, nodes: int, requests: int = 1) -> float:
        """Return a plain step and a little more for every node of every request."""
        return 1.0 + _NOMINAL_NODE * nodes * requests

    def of_draft(self, measured_ms: float, share: float) -> float:
        """Return the share."""
        return share

    def note(self, context: int, nodes: int, ms: float, requests: int = 1) -> None:
        """Note nothing."""


class DraftController:
    """Decides for one request, from what became of its drafts.

    Args:
        costs: what passes cost.
        limits: bounds.
        width: paths that the drafter proposes beside each other.
    """

    def __init__(self, costs: Costs, limits: DraftLimits, width: int = 1) -> None:
        self._costs = costs
        self._limits = limits
        self._width = width
        self._hits = [_PRIOR_ACCEPTANCE * 2] + [0.0] * (limits.depth - 1)
        self._tries = [2.0] + [0.0] * (limits.depth - 1)
        self._stood = self._hoped = 2.0  # nodes that stood, and that should have by the drafter's own chances
        self._pause = _FIRST_PAUSE
        self._rest = 0  # plain steps until the next probe
        self._recent = self._usual = _PRIOR_ACCEPTANCE
        self._since_refresh = 0
        self._requests = 1

    def budget(
        self, context: int, remaining: int, room: int, step_ms: float = 0.0, share: float = 0.0, requests: int = 1
    ) -> DraftBudget:
        """Return how much to draft now.

        Args:
            context: tokens before.
            remaining: tokens that the answer may still have, of which the pass itself brings one.
            room: rows that are free for nodes.
            step_ms, share: what a step of the drafter takes, as its session says.
            requests: how many the pass is of.
        """
        self._requests = requests
        limits = self._limits
        nodes = min(limits.nodes, room)
        depth = min(limits.depth, remaining - 1, nodes)
        if depth < 1:
            return DraftBudget(0, 0)
        if limits.length:
            depth = min(depth, limits.length)
        elif self._rest > 0:
            self._rest -= 1
            return DraftBudget(0, 0)
        elif step_ms > 0 or share > 0:  # drafts that cost nothing are cut when they are there
            depth = self._best_depth(context, depth, self._costs.of_draft(step_ms, share))
        return DraftBudget(depth, nodes)

    def cut(self, tree: DraftTree, context: int) -> DraftTree:
        """Return the part of `tree` that is worth verifying; for trees that tell their nodes' chances."""
        if tree.chances is None or self._limits.length or not len(tree):
            return tree
        gains = accumulate((self.trust * chance for chance in tree.chances), initial=1.0)
        rates = [gain / self._costs.of_pass(context, nodes, self._requests) for nodes, gain in enumerate(gains)]
        best = max(range(len(rates)), key=rates.__getitem__)
        return tree.cut(best if rates[best] > _GAIN * rates[0] else 0, tree.depth)

    def observe(self, tree: DraftTree, accepted: int, context: int, ms: float) -> None:
        """Note that a pass over `tree` took `ms` and that `accepted` of its tokens, behind each other, stood."""
        self._costs.note(context, len(tree), ms, self._requests)
        self._since_refresh += accepted + 1
        if not len(tree):
            return
        for depth in range(min(accepted + 1, tree.depth)):
            self._hits[depth] = self._hits[depth] * _FORGET + (depth < accepted)
            self._tries[depth] = self._tries[depth] * _FORGET + 1
        if tree.chances is not None:
            self._stood = self._stood * _FORGET_SLOWLY + accepted
            self._hoped = self._hoped * _FORGET_SLOWLY + sum(tree.chances)
        first = float(accepted > 0)
        self._recent += (1 - _FORGET) * (first - self._recent)
        self._usual += (1 - _FORGET_SLOWLY) * (first - self._usual)

    @property
    def trust(self) -> float:
        """How many nodes stood for each that should have, by the chances that trees tell."""
        return self._stood / self._hoped

    @property
    def wants_refresh(self) -> bool:
        """Whether acceptance has fallen below what it was, so that something else should be drafted from."""
        return self._since_refresh >= _REFRESH_TOKENS and self._recent < self._usual - _FALL

    def refreshed(self) -> None:
        """Note that something else is drafted from now."""
        self._since_refresh = 0
        self._usual = self._recent

    def acceptance(self, depth: int) -> float:
        """Return the chance that a token of `depth` stands once those before it do."""
        known = _PRIOR_ACCEPTANCE
        for at in range(depth + 1):
            # What little is known of a depth weighs against what is known of the one before.
            known = (self._hits[at] + known) / (self._tries[at] + 1)
        return known

    def _best_depth(self, context: int, most: int, draft: float) -> int:
        plain = 1 / self._costs.of_pass(context, 0, self._requests)
        tokens, reached = 1.0, 1.0
        best, rate = 0, _GAIN * plain
        for depth in range(1, most + 1):
            reached *= self.acceptance(depth - 1)
            tokens += reached
            here = tokens / (depth * draft + self._costs.of_pass(context, depth * self._width, self._requests))
            if here > rate:
                best, rate = depth, here
        if best:
            self._pause = _FIRST_PAUSE
            return best
        self._rest = self._pause
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
        return min(_PROBE_DEPTH, most)


def _bucket(nodes: int) -> int:
    """Return the number of nodes that a pass over `nodes` is counted with."""
    return min(_NODES, key=lambda count: (abs(count - nodes), count)) if nodes else 0


def expected_tokens(acceptance: float, length: int) -> float:
    """Return (1 - a^(n + 1)) / (1 - a), tokens that a pass over a chain of n brings (arXiv 2211.17192, equation 1)."""
    if not 0 <= acceptance <= 1:
        raise ConfigError(f"acceptance must lie in [0, 1], got {acceptance}")
    return float(length + 1) if math.isclose(acceptance, 1) else (1 - acceptance ** (length + 1)) / (1 - acceptance)
