"""How the next token is chosen from the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.errors import ConfigError
from ragkit.setting_checks import random_seed


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the most likely token; else logits are divided by it.
        top_p: only the most likely tokens that together reach this probability can be drawn.
        seed: the same prompt, settings and seed give the same tokens on the same device.
        stop_token_ids: tokens that end the answer besides the model's own.
        ignore_stop_tokens: generate `max_new_tokens` whatever comes, for measurements.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_stop_tokens: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be a whole number >= 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be a finite number >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}")
        random_seed("seed", self.seed)


class Sampler:
    """Draws the tokens of one request; its random numbers are its own, so batching changes nothing."""

    def __init__(self, config: SamplingConfig) -> None:
        self._config = config
        self._generator = torch.Generator().manual_seed(config.seed)

    def next(self, logits: Tensor) -> int:
        """Return the next token id for `logits` (vocab_size,)."""
        if self._config.temperature == 0:
            return int(logits.argmax())
        return self.draw(distribution(logits, self._config))

    def draw(self, probabilities: Tensor) -> int:
        """Return a token id that has the chances of `probabilities` (vocab_size,), which need not add up to 1."""
        drawn = self.uniform()
        ordered, token_ids = probabilities.sort(descending=True, stable=True)
        reached = ordered.cumsum(0)
        index = int(torch.searchsorted(reached, drawn * reached[-1], right=True))
        return int(token_ids[min(index, len(token_ids) - 1)])

    def uniform(self) -> float:
        """Return a number from [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def distribution(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Return (vocab_size,) fp64 probabilities that a sampled token has, those outside `top_p` zero."""
    return nucleus((logits.double() / config.temperature).softmax(-1), config.top_p)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return (vocab_size,) probabilities with those outside `top_p` zero.

    The smallest set of most likely tokens whose probability reaches `top_p` stays (nucleus sampling,
    arXiv 1904.09751, section 3.1); at least one does.
    """
    if top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    ordered[before >= top_p] = 0
    kept = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return kept / kept.sum()
