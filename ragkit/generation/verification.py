"""The seam of verification: one pass of the model over the last token and all drafted ones, of several requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ragkit.generation.decode_state import DecodeState
from ragkit.generation.draft_tree import DraftTree


class Verifier(Protocol):
    """Runs the model over drafted tokens. It takes the states that the engine's `StepRunner` began.

    Between `verify` and `commit` a request's rows from `state.kv.num_tokens` on hold the pass: that of the last token
    first, then the nodes of its tree in their order, node i in the row of position `num_tokens + 1 + i`, whatever its
    true position, which is `num_tokens + 1 + tree.depths[i]`.
    """

    def verify(
        self, states: Sequence[DecodeState], token_ids: Sequence[int], trees: Sequence[DraftTree]
    ) -> list[Tensor]:
        """Return (nodes + 1, vocab_size) logits a request: after its last token, and after each node of its tree.

        Args:
            states: the requests; none twice. A row is reserved for the last token and for every node.
            token_ids: the last token of each, whose row is not written yet: the one that a `StepRunner` would take.
            trees: what was drafted behind it; may be empty.
        """
        ...

    def commit(self, state: DecodeState, accepted: Sequence[int]) -> None:
        """Keep the row of the last token and those of the nodes `accepted`, and forget the others.

        Afterwards `state.kv.num_tokens` has grown by `len(accepted) + 1`, and the accepted rows stand behind each
        other at their true positions, as plain steps would have written them.

        Args:
            state: one of the last `verify`.
            accepted: nodes of its tree, each the child of the one before it, the first of depth 0; may be empty.
        """
        ...
