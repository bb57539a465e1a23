"""The seam of prefill strategies: full and blend, one file each. Drafting is a separate axis."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ragkit.generation.decoder import Decoder
from ragkit.kernels.host_copy import to_device
from ragkit.kvcache.chunk_kv import ChunkRef
from ragkit.kvcache.coverage import Ratio
from ragkit.kvcache.kv_store import KVStore
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable
from ragkit.types import KVUse, Prompt


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """What a strategy works on.

    Attributes:
        prompt: the prompt in segments.
        kv: the request's empty KV state. The strategy lists or writes a row for every prompt token and sets
            `num_tokens`.
        rotary: the request's rotary table, long enough for prompt and answer.
        ratio: part of the reused tokens to recompute, or what that must cover, for strategies that do so; None is the
            strategy's own.
        answer_tokens: positions that will be wanted behind the prompt.
    """

    prompt: Prompt
    kv: RequestKV
    rotary: RotaryTable
    ratio: Ratio | None = None
    answer_tokens: int = 0

    def token_ids(self) -> Tensor:
        """Return (tokens,) int64, the prompt's ids on the device of its rows; the host does not wait for the copy."""
        # `struct` takes a fifth of the time of `array`, which counts at tens of thousands of tokens.
        packed = bytearray()
        for segment in self.prompt.segments:
            packed += struct.pack(f"={len(segment.token_ids)}q", *segment.token_ids)
        on_host = torch.frombuffer(packed, dtype=torch.int64) if packed else torch.empty(0, dtype=torch.int64)
        return to_device(on_host, self.kv.pool.device)


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """What a strategy returns.

    Attributes:
        logits: (vocab_size,) after the prompt's last token.
        reused, recomputed: prompt tokens whose KV was taken from a store, and computed now.
        timings_ms: what it spent, by step.
        kv: where reused KV came from.
        afterwards: what is left to do once the first token is out, for the sake of later requests.
        warnings: what was not done as configured, and why.
    """

    logits: Tensor
    reused: int
    recomputed: int
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    kv: KVUse = field(default_factory=KVUse)
    afterwards: Callable[[], None] | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LaunchedPrefill:
    """A prefill that a GPU may still be at: the host can launch what comes behind it.

    Attributes:
        logits: (vocab_size,) after the prompt's last token.
        finish: waits for it, lets go of what it held, and returns its result. Is called once, whatever happens.
    """

    logits: Tensor
    finish: Callable[[], PrefillResult]


class PrefillStrategy(Protocol):
    """Brings a prompt's KV rows into the pool and returns the first logits."""

    @property
    def name(self) -> str:
        """The name that `--strategy` takes."""
        ...

    def prefill(self, decoder: Decoder, request: PrefillRequest) -> PrefillResult:
        """Return the logits of the first token; afterwards `request.kv` holds the whole prompt.

        Raises:
            CacheCapacityError: the pool has too few free blocks.
        """
        ...


@runtime_checkable
class LaunchingStrategy(Protocol):
    """A `PrefillStrategy` that need not wait for what it launches."""

    def launch(self, decoder: Decoder, request: PrefillRequest) -> LaunchedPrefill:
        """Launch what `prefill` does; `request.kv` holds the whole prompt for whatever is launched behind it.

        Raises:
            CacheCapacityError: the pool has too few free blocks.
        """
        ...


@runtime_checkable
class ReusingStrategy(Protocol):
    """A `PrefillStrategy` that fetches chunk KV, which can be brought into memory before its turn comes."""

    @property
    def kv_store(self) -> KVStore:
        """Where it fetches from."""
        ...

    def chunk_refs(self, prompt: Prompt) -> Sequence[ChunkRef]:
        """Return the references of the KV that a prompt's prefill will fetch, in its order."""
        ...


def launch(strategy: PrefillStrategy, decoder: Decoder, request: PrefillRequest) -> LaunchedPrefill:
    """Return the launched prefill of a strategy; of one that cannot but wait, it is done already."""
    if isinstance(strategy, LaunchingStrategy):
        return strategy.launch(decoder, request)
    return done(strategy.prefill(decoder, request))


def done(prefilled: PrefillResult) -> LaunchedPrefill:
    """Return a prefill of which nothing is left to be finished."""
    return LaunchedPrefill(prefilled.logits, lambda: prefilled)
