"""Which drafted tokens stand: the mathematics of speculative decoding, for chains and trees.

`DraftMode.EXACT`: every token has exactly the distribution p that the target alone gives it.

- Greedy: a draft stands where it is the target's most likely token.
- Drafts that were not drawn (they are certain to be proposed): a token is drawn from p as without drafting, and a
  draft that equals it stands. With the same seed the answer is the same token for token, whatever was drafted.
- Drafts that were drawn: each child x of a node, drawn from q, stands with probability min(1, p(x) / q(x)); if it does
  not, p becomes norm(max(p - q, 0)) and the next child is tried; behind the last one a token is drawn from what p has
  become. One child is speculative sampling (arXiv 2211.17192, theorem 1). For several the theorem holds in every round,
  given what was drawn before, as long as q is the distribution that the child was really drawn from then: with
  replacement (arXiv 2305.09781, section 4.3) or without (arXiv 2402.14160, section 3.1).

`DraftMode.TRANSFER`: the target itself is another one, `transferred` (RAPID, arXiv 2502.20330, equations 6 to 9), and
then it is sampled as exactly. That is not what the paper does, whose residual norm(max(p - p^, p - q, 0)) gives an
output that is neither p nor p^; here it is p^ by the same theorem. Where no token was drafted there is nothing to
transfer, and the output is p: which of the two a token has depends on where drafts end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.errors import ConfigError
from ragkit.generation.draft_tree import ROOT, DraftTree
from ragkit.generation.sampling import Sampler, SamplingConfig, distribution, nucleus
from ragkit.kernels.rejection_sample import rejection_sample

_BELOW_ONE = 1 - 2**-24  # the largest fp32 number that uniform ones may round to


@dataclass(frozen=True, slots=True)
class Transfer:
    """How far the target moves towards the drafter.

    Attributes:
        strength: eta of equation 6: how much of the difference between the distributions is added to the logits.
        tail: tokens that then have less than this part of the highest probability keep their own (equation 9).
    """

    strength: float = 10.0
    tail: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ConfigError(f"the strength of transfer must be a finite number >= 0, got {self.strength}")
        if not 0 <= self.tail <= 1:
            raise ConfigError(f"the tail of transfer must lie in [0, 1], got {self.tail}")


class Accepted(NamedTuple):
    """What stands of one draft.

    Attributes:
        nodes: the accepted nodes, each the child of the one before it.
        token_id: the token behind them, which the target chose itself.
    """

    nodes: tuple[int, ...]
    token_id: int


class Acceptance:
    """Decides for one request; its random numbers are its own.

    Args:
        sampling: how tokens are chosen.
        transfer: the mode `transfer`; None is `exact`.
    """

    def __init__(self, sampling: SamplingConfig, transfer: Transfer | None = None) -> None:
        self._sampling = sampling
        self._transfer = transfer
        self._sampler = Sampler(sampling)

    def first(self, logits: Tensor) -> int:
        """Return a token for `logits` (vocab_size,) that nothing was drafted for."""
        return self._sampler.next(logits)

    def accept(self, logits: Tensor, tree: DraftTree, likeliest: Sequence[int] = ()) -> Accepted:
        """Return what stands of `tree`.

        Args:
            logits: (nodes + 1, vocab_size), the target's: after the last token, and after each node.
            tree: what was drafted.
            likeliest: the token with the highest of each row, where the caller knows them: of many requests the device
                tells them at once.
        """
        if self._sampling.temperature == 0:
            return _followed(tree, self._most_likely(logits, tree, likeliest))
        if tree.probabilities is None:
            return self._as_sampled(logits, tree)
        if logits.is_cuda and tree.is_chain and self._transfer is None and self._sampling.top_p == 1:
            return self._on_device(logits, tree, tree.probabilities)
        return self._by_rounds(logits, tree, tree.probabilities)

    def _most_likely(self, logits: Tensor, tree: DraftTree, likeliest: Sequence[int]) -> list[int]:
        tokens: list[int] = list(likeliest) or logits.argmax(-1).tolist()
        if self._transfer is not None and tree.probabilities is not None:
            for node in range(ROOT, len(tree)):
                if children := tree.children(node):
                    own = logits[node + 1].double().softmax(-1)
                    moved = transferred(own, tree.probabilities[children[0]], self._transfer)
                    tokens[node + 1] = int(moved.argmax())
        return tokens

    def _as_sampled(self, logits: Tensor, tree: DraftTree) -> Accepted:
        nodes: list[int] = []
        node: int | None = ROOT
        while node is not None:
            token = self._sampler.next(logits[node + 1])
            node = _child(tree, node, token)
            if node is not None:
                nodes.append(node)
        return Accepted(tuple(nodes), token)

    def _by_rounds(self, logits: Tensor, tree: DraftTree, drawn_from: Tensor) -> Accepted:
        equals: tuple[int, ...] = (ROOT,)  # nodes with the same tokens up to them: what follows one follows all
        while True:
            children = [child for node in equals for child in tree.children(node)]
            target = self._target(logits[equals[0] + 1], drawn_from[children[0]] if children else None)
            stands = None
            for child in children:
                proposal = drawn_from[child].to(target)
                token = tree.token_ids[child]
                if self._sampler.uniform() * float(proposal[token]) < float(target[token]):
                    stands = child
                    break
                target = residual(target, proposal)
            if stands is None:
                return Accepted(tree.path(equals[0]), self._sampler.draw(target))
            token = tree.token_ids[stands]
            equals = tuple(child for child in children if tree.token_ids[child] == token)

    def _on_device(self, logits: Tensor, tree: DraftTree, drawn_from: Tensor) -> Accepted:
        """Return what `_by_rounds` decides of a chain, in fp32, asking the device but once."""
        device, nodes = logits.device, len(tree)
        numbers = [self._sampler.uniform() for _ in range(2 * (nodes + 1))]
        outcome = rejection_sample(
            logits.unsqueeze(0).contiguous(),
            torch.tensor([tree.token_ids], dtype=torch.int64).to(device),
            torch.tensor([nodes]).to(device),
            torch.tensor([self._sampling.temperature], dtype=torch.float32).to(device),
            torch.tensor(numbers, dtype=torch.float32).clamp_(max=_BELOW_ONE).view(1, nodes + 1, 2).to(device),
            drawn_from.float().unsqueeze(0).contiguous(),
        )
        accepted, token = torch.cat(outcome).tolist()
        return Accepted(tuple(range(accepted)), token)

    def _target(self, logits: Tensor, teacher: Tensor | None) -> Tensor:
        if self._transfer is None or teacher is None:
            return distribution(logits, self._sampling)
        own = (logits.double() / self._sampling.temperature).softmax(-1)
        return nucleus(transferred(own, teacher, self._transfer), self._sampling.top_p)


def transferred(own: Tensor, teacher: Tensor, transfer: Transfer) -> Tensor:
    """Return (vocab_size,) p^: the target's distribution moved towards the drafter's.

    p^ = softmax(log p + eta (q - p)), equation 6 (the gradient of a distillation step with q as its teacher), and then
    p where p^ lies below `tail` times its maximum, equation 9, all divided by their sum.

    Args:
        own: (vocab_size,) p of the target, temperature included.
        teacher: (vocab_size,) q of the drafter.
        transfer: eta and the tail.
    """
    moved = (own.log() + transfer.strength * (teacher.to(own) - own)).softmax(-1)
    guarded = torch.where(moved < transfer.tail * moved.max(), own, moved)
    return guarded / guarded.sum()


def residual(target: Tensor, proposal: Tensor) -> Tensor:
    """Return (vocab_size,) norm(max(target - proposal, 0)): what is left to draw from once a draft was rejected.

    Where nothing is left the two are equal but for rounding, and the target is returned.
    """
    left = (target - proposal).clamp(min=0)
    total = float(left.sum())
    return left / total if total > 0 else target


def _followed(tree: DraftTree, tokens: Sequence[int]) -> Accepted:
    """Return the path along which each node's token is the one in `tokens`, chosen after the node before it."""
    nodes: list[int] = []
    node = ROOT
    while (child := _child(tree, node, tokens[node + 1])) is not None:
        nodes.append(child)
        node = child
    return Accepted(tuple(nodes), tokens[node + 1])


def _child(tree: DraftTree, node: int, token: int) -> int | None:
    return next((child for child in tree.children(node) if tree.token_ids[child] == token), None)
