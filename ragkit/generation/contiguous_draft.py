"""Chains of tokens from a model in plain torch: what `DraftRunner` does on a GPU, on contiguous private copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ragkit.generation.contiguous_decode import ContiguousDecodeRunner
from ragkit.generation.contiguous_verify import ContiguousVerifier
from ragkit.generation.decode_state import DecodeState
from ragkit.generation.decoder import Decoder
from ragkit.generation.draft_runner import DrawnSteps
from ragkit.generation.draft_tree import DraftTree
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable


class ChainRunner(Protocol):
    """Drafts chains by a model, for several requests at once."""

    def begin(self, kv: RequestKV, rotary: RotaryTable) -> DecodeState:
        """Return the state that chains of this request take; `kv` holds the prompt."""
        ...

    def draft(
        self,
        states: Sequence[DecodeState],
        pending: Sequence[Sequence[int]],
        steps: int,
        drawn: DrawnSteps | None = None,
    ) -> list[DraftTree]:
        """Return a chain of `steps` tokens a request behind its `pending` tokens, as `DraftRunner` says."""
        ...


@dataclass(frozen=True, slots=True)
class ContiguousDraftRunner:
    """The `ChainRunner` for devices without the paged kernels; also the reference of the one that has them."""

    decoder: Decoder

    def begin(self, kv: RequestKV, rotary: RotaryTable) -> DecodeState:
        """Return a state with room for all positions that `kv` has reserved."""
        return ContiguousDecodeRunner(self.decoder).begin(kv, rotary)

    def draft(
        self,
        states: Sequence[DecodeState],
        pending: Sequence[Sequence[int]],
        steps: int,
        drawn: DrawnSteps | None = None,
    ) -> list[DraftTree]:
        """Return a chain a request; the rows of its pending tokens are kept, those of drafted ones stand behind."""
        verifier, runner = ContiguousVerifier(self.decoder), ContiguousDecodeRunner(self.decoder)
        heads = [DraftTree.chain(tokens[1:]) for tokens in pending]
        passed = verifier.verify(states, [tokens[0] for tokens in pending], heads)
        for state, head in zip(states, heads, strict=True):
            verifier.commit(state, range(len(head)))
        kept = [state.kv.num_tokens for state in states]
        logits = torch.stack([rows[-1] for rows in passed])
        tokens: list[Tensor] = []
        shares: list[Tensor] = []
        for step in range(steps):
            if step:
                logits = runner.step(states, tokens[-1].tolist())
            if drawn is None:
                tokens.append(logits.argmax(-1))
                continue
            shares.append((logits.float() / drawn.temperature).softmax(-1))
            reached = shares[-1].cumsum(-1)
            goal = drawn.uniforms[:, step : step + 1].to(reached) * reached[:, -1:]
            token = torch.searchsorted(reached, goal, right=True).squeeze(1)
            tokens.append(token.clamp_(max=logits.shape[1] - 1))
        for state, count in zip(states, kept, strict=True):
            state.kv.num_tokens = count
        chains = torch.stack(tokens, dim=1).tolist()
        if drawn is None:
            return [DraftTree.chain(chain) for chain in chains]
        return [DraftTree.chain(chain, own) for chain, own in zip(chains, torch.stack(shares, dim=1), strict=True)]
