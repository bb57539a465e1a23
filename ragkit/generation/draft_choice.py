"""How much of all requests' drafts one pass verifies: what brings most tokens a millisecond, all of them together.

A pass makes everybody wait for the drafts of each. With `a` the chances that nodes stand, requests R and cost c, drafts
are worth their place as long as (R + sum of a) / c grows: the rule of one request, of which R = 1.

What fell often is trusted less, and what is not verified cannot win trust back. So first nodes are probed where they
would pay by their drafter's own chances, as far as a small share of all passes allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

_GAIN = 1.02  # of what drafts must bring before they are verified


def nodes_worth_verifying(
    chances: Sequence[Sequence[float]], costs: Sequence[float], *, is_padded: bool
) -> list[int]:  # fmt: skip
    """Return how many of each tree's first nodes are worth a common pass; 0 of all where plain steps are faster.

    Args:
        chances: how likely each node stands, for every request of the pass; empty where it has no draft.
        costs: of a pass with 0, 1, ... nodes of each request, at least up to the size of the largest tree.
        is_padded: whether a pass takes as long as if each request had as many nodes as the largest tree.
    """
    # A node is not worth more than those before it, which are verified with it.
    bounded = [list(accumulate(one, min)) for one in chances]
    if is_padded:
        return _same_for_all(bounded, costs)
    requests = len(bounded)
    ordered = sorted((-chance, node, tree) for tree, one in enumerate(bounded) for node, chance in enumerate(one))
    best, rate, tokens = 0, _GAIN * requests / costs[0], float(requests)
    for count, (negative, _, _) in enumerate(ordered, start=1):
        tokens -= negative
        here = tokens / _between(costs, count / requests)
        if here > rate:
            best, rate = count, here
    kept = [0] * requests
    for _, _, tree in ordered[:best]:
        kept[tree] += 1
    return kept


def nodes_worth_probing(
    chances: Sequence[Sequence[float]],
    hopes: Sequence[Sequence[float]],
    kept: Sequence[int],
    costs: Sequence[float],
    allowed: float,
    *,
    is_padded: bool,
) -> tuple[list[int], float]:
    """Return the trees of which the first node is verified as well, and what that costs in plain passes of all.

    Args:
        chances: how likely each node stands, as `nodes_worth_verifying` takes them.
        hopes: the same by what drafters say, whatever became of earlier drafts.
        kept: what `nodes_worth_verifying` returned.
        costs: as there.
        allowed: what may be spent, in plain passes.
        is_padded: as there.
    """
    doubted = [tree for tree, count in enumerate(kept) if count == 0 and hopes[tree]]
    if not doubted or allowed <= 0:
        return [], 0.0
    hoped = [hopes[tree] if tree in doubted else own for tree, own in enumerate(chances)]
    worth = nodes_worth_verifying(hoped, costs, is_padded=is_padded)
    probed = sorted((tree for tree in doubted if worth[tree]), key=lambda tree: -chances[tree][0])
    if is_padded:  # where one has a node there is a place for all
        spent = (costs[1] - costs[0]) / costs[0] if probed and not any(kept) else 0.0
        return (sorted(probed), spent) if spent <= allowed else ([], 0.0)
    requests, nodes = len(kept), sum(kept)
    before = _between(costs, nodes / requests)
    spent = 0.0
    for count in range(len(probed), 0, -1):
        spent = (_between(costs, (nodes + count) / requests) - before) / costs[0]
        if spent <= allowed:
            return sorted(probed[:count]), spent
    return [], 0.0


def _same_for_all(chances: Sequence[Sequence[float]], costs: Sequence[float]) -> list[int]:
    best, rate, tokens = 0, _GAIN * len(chances) / costs[0], float(len(chances))
    for level in range(1, max(map(len, chances)) + 1):
        tokens += sum(one[level - 1] for one in chances if len(one) >= level)
        here = tokens / costs[level]
        if here > rate:
            best, rate = level, here
    return [min(best, len(one)) for one in chances]


def _between(costs: Sequence[float], nodes: float) -> float:
    low = min(int(nodes), len(costs) - 1)
    high = min(low + 1, len(costs) - 1)
    return costs[low] + (costs[high] - costs[low]) * (nodes - low)
