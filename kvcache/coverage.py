"""A budget that follows from an error estimate: recompute until the question's attention is covered."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.config import AUTO, BlendConfig
from ragkit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the question's attention falls on recomputed tokens, and between which bounds that is sought.

    The attention on tokens that keep their reused KV is the estimate of the error: what the question does not look at
    cannot mislead it. Attention to chunks whose KV is exact, to the prefix and to the question itself does not count.

    Attributes:
        share: part of the attention to be covered, from 0 to 1.
        least, most: bounds of the recomputed part of the chunks' tokens, from 0 to 1.
    """

    share: float
    least: float
    most: float

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.least <= self.most <= 1):  # not a number is none of these
            raise ConfigError(
                "a coverage needs a share in [0, 1] and bounds with 0 <= least <= most <= 1, "
                f"got share {self.share!r}, least {self.least!r}, most {self.most!r}"
            )

    def tokens(self, mass: Tensor, first: Tensor, num_tokens: int) -> int:
        """Return the least number of tokens that cover the share, within the bounds; a GPU's host waits for it.

        Args:
            mass: (tokens,) attention that each token receives, of those tokens that recomputing improves.
            first: (taken,) int64 indices into `mass` that are taken before all others; these follow by their mass.
            num_tokens: of all chunks, which the bounds are shares of. The number is below `least` where `mass` is of
                fewer tokens.
        """
        rest = mass.index_fill(0, first, 0.0).sort(descending=True).values
        # In fp64: over a long prompt the sums of fp32 would lie as far off as tokens weigh.
        covered = torch.cat((mass.new_zeros(1), mass[first], rest)).double().cumsum(0)
        enough = int((covered < self.share * covered[-1]).sum())
        enough = max(enough, count_of(self.least, num_tokens))
        return min(enough, count_of(self.most, num_tokens), len(mass))


#: What is recomputed: a part of the chunks' tokens, or as many as cover the question's attention.
Ratio = float | Coverage


def most_of(ratio: Ratio) -> float:
    """Return the largest part of the chunks' tokens that is recomputed."""
    return ratio.most if isinstance(ratio, Coverage) else ratio


def count_of(share: float, num_tokens: int) -> int:
    """Return how many of `num_tokens` a share is, rounded down."""
    return math.floor(share * num_tokens + 1e-9)


def configured_ratio(blend: BlendConfig) -> Ratio:
    """Return what the configuration says."""
    if blend.ratio == AUTO:
        return Coverage(blend.auto_coverage, blend.auto_least, blend.auto_most)
    return blend.ratio
