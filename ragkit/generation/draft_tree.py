"""What a drafter proposes: a tree of tokens behind the last accepted one, of which a chain is the common case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ragkit.errors import GenerationError

ROOT = -1  # the parent of nodes that follow the last accepted token


@dataclass(frozen=True)
class DraftTree:
    """Drafted tokens. Node i follows node `parents[i]`, which stands before it, or the last accepted token (`ROOT`).

    Siblings are tried in the order of their numbers. Where they were drawn at random two of them may hold the same
    token; acceptance then goes on behind both.

    Attributes:
        token_ids: the token of each node.
        parents: the parent of each node.
        probabilities: (nodes, vocab_size), the distribution that each node was drawn from, given its parent and the
            siblings before it: without replacement these have probability 0 there. The row of a parent's first child
            is the drafter's own distribution. None where nothing was drawn: every node is certain to be proposed.
        chances: how likely each node stands, by the drafter's estimate; None where it has none.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    probabilities: Tensor | None = None
    chances: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.parents):
            raise GenerationError(f"{len(self.token_ids)} drafted tokens have {len(self.parents)} parents")
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise GenerationError(f"node {node} of a draft follows {parent}; parents stand before their children")
        if self.probabilities is not None and len(self.probabilities) != len(self.token_ids):
            raise GenerationError(f"{len(self.token_ids)} drafted tokens have {len(self.probabilities)} distributions")

    @classmethod
    def chain(cls, token_ids: Sequence[int], probabilities: Tensor | None = None) -> DraftTree:
        """Return the tree in which every token follows the one before it."""
        return cls(tuple(token_ids), tuple(range(ROOT, len(token_ids) - 1)), probabilities)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        """Whether every node follows the one before it."""
        return self.parents == tuple(range(ROOT, len(self) - 1))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The depth of each node; 0 directly behind the last accepted token."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return max(self.depths, default=ROOT) + 1

    def positions(self, start: int) -> tuple[int, ...]:
        """Return the true position of each node, where those of depth 0 stand at `start`."""
        return tuple(start + depth for depth in self.depths)

    @cached_property
    def _children(self) -> dict[int, tuple[int, ...]]:
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            children.setdefault(parent, []).append(node)
        return {parent: tuple(nodes) for parent, nodes in children.items()}

    def children(self, node: int) -> tuple[int, ...]:
        """Return the nodes that follow `node` (or `ROOT`), in the order in which they are tried."""
        return self._children.get(node, ())

    def path(self, node: int) -> tuple[int, ...]:
        """Return the nodes from the root down to `node`, itself last."""
        nodes: list[int] = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    def ancestors(self) -> Tensor:
        """Return (nodes, nodes) bool on the host: whether row i sees column j, itself and the nodes on its path."""
        seen = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                seen[node] |= seen[parent]
        return seen

    def cut(self, nodes: int, depth: int) -> DraftTree:
        """Return the tree without nodes of `depth` or deeper, and of the others the first `nodes` only."""
        kept = [node for node in range(len(self)) if self.depths[node] < depth][:nodes]
        if len(kept) == len(self):
            return self
        place = {ROOT: ROOT} | {node: index for index, node in enumerate(kept)}
        return DraftTree(
            tuple(self.token_ids[node] for node in kept),
            tuple(place[self.parents[node]] for node in kept),
            None if self.probabilities is None else self.probabilities[kept],
            None if self.chances is None else tuple(self.chances[node] for node in kept),
        )


def joined(trees: Sequence[DraftTree]) -> DraftTree:
    """Return one tree that holds `trees` side by side, each tried before those behind it.

    Nodes that are certain to be proposed stand once. Drawn ones stay apart: each is a draw of its own.

    Raises:
        GenerationError: some were drawn and others were not.
    """
    trees = [tree for tree in trees if len(tree)]
    drawn = [tree.probabilities for tree in trees if tree.probabilities is not None]
    if drawn and len(drawn) != len(trees):
        raise GenerationError("drafts that were drawn and drafts that were not cannot be joined into one tree")
    token_ids: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for tree in trees:
        place = {ROOT: ROOT}
        for node, (token, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True)):
            at = (place[parent], token)
            if drawn or at not in known:
                known[at] = len(token_ids)
                token_ids.append(token)
                parents.append(at[0])
            place[node] = known[at]
    return DraftTree(tuple(token_ids), tuple(parents), torch.cat(drawn) if drawn else None)
