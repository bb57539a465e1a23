"""The prior over chunk lengths that the settings name, for every chunker alike."""

from __future__ import annotations

from ragkit.chunking.length_constrained import (
    ClippedPolynomialPrior,
    GaussianPrior,
    LengthPrior,
    LogNormalPrior,
    UniformPrior,
)
from ragkit.config import ChunkingConfig, LengthPriorName

_TARGET_SHARE = 2 / 3  # of the tokens that a chunk has room for
# Half the target loses 1.1, 1.0 and 0.6 in the logarithm: what a cut at a paragraph instead of a sentence is worth.
_GAUSSIAN_SPREAD, _LOG_NORMAL_SPREAD, _POLYNOMIAL_SPREAD = 1 / 3, 0.5, 0.75


def configured_prior(config: ChunkingConfig) -> LengthPrior | None:
    """Return the prior that `config` names, None where each chunker takes its own.

    A `length_target` of 0 is two thirds of what a chunk has room for besides its overlap; a `length_spread` of 0 is
    a third of the target (gaussian), 0.5 in the logarithm (log-normal) or three quarters of the target (polynomial).
    """
    target = config.length_target or max(1.0, _TARGET_SHARE * (config.max_tokens - config.overlap_tokens))
    spread = config.length_spread
    match config.length_prior:
        case LengthPriorName.AUTO:
            return None
        case LengthPriorName.UNIFORM:
            return UniformPrior()
        case LengthPriorName.GAUSSIAN:
            return GaussianPrior(target, spread or _GAUSSIAN_SPREAD * target)
        case LengthPriorName.LOG_NORMAL:
            return LogNormalPrior(target, spread or _LOG_NORMAL_SPREAD)
        case LengthPriorName.POLYNOMIAL:
            return ClippedPolynomialPrior(target, spread or _POLYNOMIAL_SPREAD * target)
