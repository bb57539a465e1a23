"""The balanced chunker: whole paragraphs where they fit, in chunks of even length, without a model.

Greedy packing fills every chunk to the cap and leaves what remains as it falls. Here the length-constrained search
weighs all cuts of a text together: a log-normal prior pulls the chunks towards two thirds of the cap, and a cut
between paragraphs is worth some distance from it. Sentences are cut only where they are over the cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ragkit.chunking.length_constrained import LogNormalPrior
from ragkit.chunking.scored import BoundaryScores, ScoredChunker
from ragkit.chunking.signals import LOG_ODDS
from ragkit.chunking.units import Units
from ragkit.config import ChunkingConfig
from ragkit.errors import UsageError
from ragkit.types import TextTokenizer


@dataclass(frozen=True, slots=True)
class BalancedOptions:
    """How even the chunks are.

    Attributes:
        target_share: the most welcome length as a share of the cap.
        spread: standard deviation of the logarithm of the length.
        paragraph_log_odds: what a cut between paragraphs is worth.
    """

    target_share: float = 2 / 3
    spread: float = 0.5
    paragraph_log_odds: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.target_share <= 1:
            raise UsageError(
                f"the target of the balanced chunker must lie in (0, 1] of the cap, got {self.target_share}"
            )

    def prior(self, max_tokens: int) -> LogNormalPrior:
        """Return the prior under a cap."""
        return LogNormalPrior(self.target_share * max_tokens, self.spread)


class EvenScorer:
    """Likes every boundary alike: layout and length decide."""

    name = "balanced"
    fingerprint = "even"
    measure = LOG_ODDS

    def score(self, texts: Sequence[str], units: Sequence[Units]) -> list[BoundaryScores]:
        """Return even odds."""
        del texts
        even = [np.zeros(max(0, len(some) - 1)) for some in units]
        return [BoundaryScores(odds, None) for odds in even]


def balanced_chunker(
    config: ChunkingConfig, tokenizer: TextTokenizer, options: BalancedOptions | None = None
) -> ScoredChunker:
    """Return a chunker that cuts at paragraphs into chunks of even length, and holds the cap."""
    options = options or BalancedOptions()
    prior = options.prior(config.max_tokens - config.overlap_tokens)
    return ScoredChunker(EvenScorer(), config, tokenizer, prior, options.paragraph_log_odds)
