"""Prefill that is computed once: what decodes the same prompt again and again gets the same rows without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.generation.decoder import Decoder
from ragkit.generation.strategy import PrefillRequest, PrefillResult, PrefillStrategy


class RepeatedPrefill:
    """Computes the rows of a prompt by another strategy, and copies them for every further request with that prompt.

    Args:
        strategy: computes a prompt that it has not just seen; it must write every row into the request's own blocks.
    """

    def __init__(self, strategy: PrefillStrategy) -> None:
        self._strategy = strategy
        self._token_ids: tuple[int, ...] = ()
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._result: PrefillResult | None = None

    @property
    def name(self) -> str:
        """The name of the strategy."""
        return self._strategy.name

    def prefill(self, decoder: Decoder, request: PrefillRequest) -> PrefillResult:
        """Return what the strategy returned for this prompt."""
        kv, token_ids = request.kv, request.prompt.token_ids
        if self._result is None or token_ids != self._token_ids:
            self._result = self._strategy.prefill(decoder, request)
            slots = kv.slots(0, len(token_ids)).to(kv.pool.device)
            self._rows = [kv.pool.rows(layer, slots) for layer in range(kv.pool.layout.num_layers)]
            self._token_ids = token_ids
            return self._result
        kv.reserve(len(token_ids))
        slots = kv.slots(0, len(token_ids)).to(kv.pool.device)
        for layer, (keys, values) in enumerate(self._rows):
            kv.pool.keys[layer].flatten(0, 1)[slots] = keys
            kv.pool.values[layer].flatten(0, 1)[slots] = values
        kv.num_tokens = len(token_ids)
        if kv.pool.device.type == "cuda":
            torch.cuda.synchronize(kv.pool.device)
        return self._result
