"""Rotary tables of one model, built once and shared by all requests that turn by the same frequencies."""

from __future__ import annotations

import threading

from ragkit.generation.decoder import Decoder
from ragkit.kernels.backend import next_power_of_2
from ragkit.kvcache.rope import RotaryTable, has_own_frequencies

_LEAST_POSITIONS = 2048


class RotaryCache:
    """Hands out the rotary table of a request.

    One table serves all requests. It grows by doubling on the CPU; on a GPU it covers the whole window from the
    start, because graphs hold on to it. Only `dynamic` frequencies beyond their window belong to one request.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._lock = threading.Lock()
        self._shared: RotaryTable | None = None

    def table(self, positions: int, prompt_tokens: int) -> RotaryTable:
        """Return a table of at least `positions` rows for a request with a prompt of `prompt_tokens`."""
        if has_own_frequencies(self._decoder.config.rope, prompt_tokens):
            return self._build(positions, prompt_tokens)
        with self._lock:
            if self._shared is None or len(self._shared.cos) < positions:
                window = self._decoder.config.max_context
                on_gpu = self._decoder.device.type == "cuda"
                rows = window if on_gpu else min(window, max(_LEAST_POSITIONS, next_power_of_2(positions)))
                self._shared = self._build(max(rows, positions), 0)
            return self._shared

    def _build(self, positions: int, length: int) -> RotaryTable:
        config = self._decoder.config
        return RotaryTable.build(config.rope, config.head_dim, positions, self._decoder.device, length)
