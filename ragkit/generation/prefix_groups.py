"""Common beginnings of many prompts, found before any of them runs: what is computed once, and who starts when.

BatchLLM (arXiv 2412.03594): a tree of all prompts' prefixes, cut by a dynamic programme into groups of one level that
save the most tokens; a group's requests start one after another, and groups with long answers and short prompts start
first, so that later prefills have decoding rows to be mixed with. Blocks are listed by reference here, so every node of
the tree can be held once, not only the groups' own: the groups give the order, the tree gives what is shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: Tokens from which a common beginning is worth a block of its own, whose last rows may stay empty.
LEAST_SHARED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """A beginning that several prompts have in common.

    Attributes:
        depth: its tokens, those of the nodes above it included.
        first, stop: the prompts that begin with it, as places in `PrefixTree.order`.
        parent: the node above it, as a place in `PrefixTree.nodes`, or None.
    """

    depth: int
    first: int
    stop: int
    parent: int | None

    @property
    def leaves(self) -> int:
        """How many prompts begin with it."""
        return self.stop - self.first


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """All common beginnings of some prompts. Each prompt has at least one token behind all of them.

    Attributes:
        order: the prompts in the order of the tree, depth first.
        nodes: children before their parents; each has at least two prompts and a token more than its parent.
    """

    order: tuple[int, ...]
    nodes: tuple[PrefixNode, ...]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> PrefixTree:
        """Return the tree of `prompts`, of one token or more each."""
        keys = [tuple(prompt) for prompt in prompts]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        arrays = [np.asarray(keys[index], dtype=np.int64) for index in order]
        common = [_common_tokens(left, right) for left, right in pairwise(arrays)]
        return cls(tuple(order), _with_parents(_intervals(common)))


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Requests that start one after another.

    Attributes:
        prefix_tokens: what all of them begin with; 0 for a request on its own.
        members: the prompts.
    """

    prefix_tokens: int
    members: tuple[int, ...]


def one_level_groups(tree: PrefixTree) -> list[PrefixGroup]:
    """Return the groups that together save the most tokens if a token is shared within its group alone.

    A group at a node costs its depth once and saves it for each prompt that belongs to it; a prompt belongs to the
    deepest group above it. So what a subtree saves depends on the nearest group above the subtree alone, and bottom up
    each node finds, for every such group, whether it had better be one itself.
    """
    direct = [node.leaves for node in tree.nodes]
    above: list[tuple[int, ...]] = [()] * len(tree.nodes)  # nodes above each node, the highest first
    for index in range(len(tree.nodes) - 1, -1, -1):
        parent = tree.nodes[index].parent
        if parent is not None:
            above[index] = (*above[parent], parent)
            direct[parent] -= tree.nodes[index].leaves
    # below[v][j]: what all nodes under v save if the j-th of (none, *above[v], v) is the nearest group above them.
    below = [np.zeros(len(path) + 2, dtype=np.int64) for path in above]
    opens: list[np.ndarray] = []
    for index, node in enumerate(tree.nodes):
        depths = np.array([0, *(tree.nodes[one].depth for one in above[index])])
        left_alone = direct[index] * depths + below[index][:-1]
        as_group = node.depth * (direct[index] - 1) + int(below[index][-1])
        opens.append(as_group > left_alone)
        if node.parent is not None:
            below[node.parent] += np.maximum(left_alone, as_group)
    members: dict[int, list[int]] = {}
    nearest: list[int | None] = [None] * len(tree.nodes)  # the group that a node's own prompts belong to
    for index in range(len(tree.nodes) - 1, -1, -1):
        parent = tree.nodes[index].parent
        group = None if parent is None else nearest[parent]
        is_group = opens[index][0 if group is None else 1 + above[index].index(group)]
        nearest[index] = index if is_group else group
    single = []
    for prompt, deepest in zip(tree.order, _deepest(tree, range(len(tree.nodes))), strict=True):
        group = None if deepest is None else nearest[deepest]
        if group is None:
            single.append(PrefixGroup(0, (prompt,)))
        else:
            members.setdefault(group, []).append(prompt)
    return [PrefixGroup(tree.nodes[group].depth, tuple(prompts)) for group, prompts in members.items()] + single


def _deepest(tree: PrefixTree, nodes: Iterable[int]) -> list[int | None]:
    """Return the deepest of `nodes` above each prompt, in the order of the tree."""
    found: list[int | None] = [None] * len(tree.order)
    for index in sorted(nodes, reverse=True):  # parents first
        node = tree.nodes[index]
        found[node.first : node.stop] = [index] * node.leaves
    return found


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A stretch of tokens that is computed once and held once for several prompts.

    Attributes:
        parent: the stretch right before it, as a place in `PrefixPlan.shared`, or None at the beginning.
        start, stop: its tokens in each of the prompts.
        source: one of the prompts.
    """

    parent: int | None
    start: int
    stop: int
    source: int


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """What some requests share, and in which order they start.

    Attributes:
        order: the prompts, first to start first.
        shared: parents before their children, those that are needed first before others.
        beginning: of each prompt, the last stretch that it shares, as a place in `shared`, or None.
    """

    order: tuple[int, ...]
    shared: tuple[SharedPrefix, ...]
    beginning: tuple[int | None, ...]

    def shared_tokens(self, prompt: int) -> int:
        """Return how many of a prompt's first tokens lie in shared stretches."""
        at = self.beginning[prompt]
        return 0 if at is None else self.shared[at].stop


def plan_prefixes(
    prompts: Sequence[Sequence[int]], answer_tokens: Sequence[int], *, least_tokens: int = LEAST_SHARED_TOKENS
) -> PrefixPlan:
    """Return what `prompts` share and in which order they start.

    Args:
        prompts: token ids, at least one each.
        answer_tokens: most tokens of each answer.
        least_tokens: of a shared stretch.
    """
    tree = PrefixTree.of(prompts)
    groups = one_level_groups(tree)

    def decode_share(group: PrefixGroup) -> float:
        rest = sum(len(prompts[one]) - group.prefix_tokens for one in group.members)
        return sum(answer_tokens[one] for one in group.members) / (group.prefix_tokens + rest)

    groups.sort(key=lambda group: (-decode_share(group), min(group.members)))
    order = tuple(one for group in groups for one in group.members)
    return PrefixPlan(order, *_shared(tree, order, least_tokens))


def unshared_plan(prompts: int) -> PrefixPlan:
    """Return the plan that shares nothing and keeps the order of that many prompts."""
    return PrefixPlan(tuple(range(prompts)), (), (None,) * prompts)


def _shared(
    tree: PrefixTree, order: Sequence[int], least_tokens: int
) -> tuple[tuple[SharedPrefix, ...], tuple[int | None, ...]]:
    """Return the stretches of the tree with enough tokens, and the last one of each prompt."""
    kept: dict[int, int | None] = {}  # node: the nearest kept node above it
    nearest: list[int | None] = [None] * len(tree.nodes)  # kept, the node itself included
    for index in range(len(tree.nodes) - 1, -1, -1):
        node = tree.nodes[index]
        above = None if node.parent is None else nearest[node.parent]
        start = 0 if above is None else tree.nodes[above].depth
        nearest[index] = above
        if node.depth - start >= least_tokens:
            kept[index] = above
            nearest[index] = index
    last = dict(zip(tree.order, _deepest(tree, kept), strict=True))
    shared: list[SharedPrefix] = []
    place: dict[int, int] = {}

    def take(index: int) -> int:
        """Return where a node's stretch stands, after those above it."""
        path = []
        at: int | None = index
        while at is not None and at not in place:
            path.append(at)
            at = kept[at]
        for one in reversed(path):
            above = kept[one]
            start = 0 if above is None else tree.nodes[above].depth
            place[one] = len(shared)
            source = tree.order[tree.nodes[one].first]
            shared.append(SharedPrefix(None if above is None else place[above], start, tree.nodes[one].depth, source))
        return place[index]

    beginning: list[int | None] = [None] * len(tree.order)
    for prompt in order:
        at = last[prompt]
        beginning[prompt] = None if at is None else take(at)
    return tuple(shared), tuple(beginning)


def _common_tokens(left: np.ndarray, right: np.ndarray) -> int:
    """Return how many first tokens two prompts have in common, one less than the shorter has at most."""
    size = min(len(left), len(right)) - 1
    differs = left[:size] != right[:size]
    return int(differs.argmax()) if differs.any() else size


def _intervals(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return depth, first and stop of all runs of neighbours with a common beginning, inner ones first."""
    found: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int]] = []  # depth and first, deeper ones last
    for place, depth in enumerate((*common, 0)):
        first = place
        while opened and opened[-1][0] > depth:
            deeper, first = opened.pop()
            found.append((deeper, first, place + 1))
        if depth and (not opened or opened[-1][0] < depth):
            opened.append((depth, first))
    return found


def _with_parents(intervals: Sequence[tuple[int, int, int]]) -> tuple[PrefixNode, ...]:
    nodes: list[PrefixNode] = []
    around: list[int] = []  # places of the intervals that hold the one at hand
    for place in range(len(intervals) - 1, -1, -1):
        depth, first, stop = intervals[place]
        while around and not intervals[around[-1]][1] <= first <= stop <= intervals[around[-1]][2]:
            around.pop()
        nodes.append(PrefixNode(depth, first, stop, around[-1] if around else None))
        around.append(place)
    return tuple(reversed(nodes))
