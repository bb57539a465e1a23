"""What a generation yields: one step a token, and at the end what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ragkit.types import DraftUse, KVUse, TokenUsage


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP_TOKEN = "stop_token"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One generated token.

    Attributes:
        token_id: its id.
        piece: the text that became certain with it; empty while a character is incomplete.
    """

    token_id: int
    piece: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last step.

    Attributes:
        piece: text that was held back until the end; usually empty.
        reason: why the answer ended.
        token_ids: all generated tokens, without the one that stopped.
        usage: token counts.
        timings_ms: prefill, first_token (from the call to the first token) and total, and the strategy's own.
        kv: where reused KV came from.
        warnings: what was not done as configured, and why.
        draft: what drafting did.
    """

    piece: str
    reason: FinishReason
    token_ids: tuple[int, ...]
    usage: TokenUsage
    timings_ms: Mapping[str, float]
    kv: KVUse = field(default_factory=KVUse)
    warnings: tuple[str, ...] = ()
    draft: DraftUse = field(default_factory=DraftUse)


GenerationStep = GeneratedToken | Finished
