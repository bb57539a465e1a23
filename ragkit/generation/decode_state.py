"""What decoding needs to know of one request between steps, and the seam of decode runners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable


@dataclass(slots=True)
class DecodeState:
    """One request while it decodes.

    Attributes:
        kv: its rows; the position of the next token is `kv.num_tokens`, whose row must be reserved.
        rotary: its rotary table.
        private: keys (rotated) and values (kv_heads, capacity, head_dim) of each layer in one run of memory, for
            runners that keep such copies; empty elsewhere.
    """

    kv: RequestKV
    rotary: RotaryTable
    private: tuple[tuple[Tensor, Tensor], ...] = ()


class StepRunner(Protocol):
    """Runs one decoding step of several requests at once."""

    def begin(self, kv: RequestKV, rotary: RotaryTable) -> DecodeState:
        """Return the state that steps of this request take; `kv` holds the prompt."""
        ...

    def step(self, states: Sequence[DecodeState], token_ids: Sequence[int]) -> Tensor:
        """Return (requests, vocab_size) logits after one more token a request, whose rows are written."""
        ...
