"""Which share of the gap that plain reuse leaves a way of blending closes, with intervals over prompts.

The share is a ratio of means, 1 - mean(d) / mean(d of plain reuse), with a paired bootstrap: prompts are drawn anew,
with all that was measured on them. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ragkit.bench.answer_distance import AnswerDistance

RESAMPLES = 2000

FloatVector: TypeAlias = NDArray[np.float64]
_Draws: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of a gap, 1 for all of it, and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """What one variant recovers over all prompts.

    Attributes:
        variant: its label.
        prompts: how many were measured.
        recomputed: mean part of the chunks' tokens that was computed.
        kl_first, kl_mean: means of `AnswerDistance`'s.
        recovered_first, recovered_mean: shares of plain reuse's gap in each; None where it leaves none.
        agrees_first: part of the prompts whose likeliest first token is full prefill's.
        nll: mean nats a token of the gold answers, of the prompts that have one; None where none has.
        recovered_nll: share of plain reuse's gap in it; prompts above full prefill's cancel those below.
        nll_moved: mean distance, in nats a token, of the gold answer's from full prefill's, whichever way.
        recovered_nll_moved: share of plain reuse's that is recovered.
        largest_logit_difference: over all prompts.
    """

    variant: str
    prompts: int
    recomputed: float
    kl_first: float
    recovered_first: Share | None
    kl_mean: float
    recovered_mean: Share | None
    agrees_first: float
    nll: float | None
    recovered_nll: Share | None
    nll_moved: float | None
    recovered_nll_moved: Share | None
    largest_logit_difference: float


def recoveries(
    prompts: Sequence[Mapping[str, AnswerDistance]], reuse: str, resamples: int = RESAMPLES
) -> list[Recovery]:
    """Return one `Recovery` a variant, in the order of the first prompt's.

    Args:
        prompts: for each prompt the distances by variant; every prompt has every variant.
        reuse: the variant that the shares are of, plain reuse.
        resamples: how often prompts are drawn anew.
    """
    if not prompts:
        return []
    return [_recovery(name, prompts, reuse, resamples) for name in prompts[0]]


def _recovery(name: str, prompts: Sequence[Mapping[str, AnswerDistance]], reuse: str, resamples: int) -> Recovery:
    mine, theirs = [prompt[name] for prompt in prompts], [prompt[reuse] for prompt in prompts]
    first, mean = (np.array([getattr(one, key) for one in mine]) for key in ("kl_first", "kl_mean"))
    reuse_first, reuse_mean = (np.array([getattr(one, key) for one in theirs]) for key in ("kl_first", "kl_mean"))
    draws = _draws(len(prompts), resamples)
    nats = [one.nll for one in mine if one.nll is not None]
    gap, reuse_gap = _nll_gap(mine), _nll_gap(theirs)
    gap_draws = _draws(len(gap), resamples)
    return Recovery(
        variant=name,
        prompts=len(prompts),
        recomputed=float(np.mean([one.recomputed for one in mine])),
        kl_first=float(first.mean()),
        recovered_first=_share(first, reuse_first, draws),
        kl_mean=float(mean.mean()),
        recovered_mean=_share(mean, reuse_mean, draws),
        agrees_first=float(np.mean([one.same_first for one in mine])),
        nll=float(np.mean(nats)) if nats else None,
        recovered_nll=_share(gap, reuse_gap, gap_draws) if len(gap) else None,
        nll_moved=float(np.abs(gap).mean()) if len(gap) else None,
        recovered_nll_moved=_share(np.abs(gap), np.abs(reuse_gap), gap_draws) if len(gap) else None,
        largest_logit_difference=max(one.largest_logit_difference for one in mine),
    )


def _draws(prompts: int, resamples: int) -> _Draws:
    # the same for every variant
    return np.random.default_rng(0).integers(0, max(prompts, 1), (resamples, prompts))


def _nll_gap(distances: Sequence[AnswerDistance]) -> FloatVector:
    return np.array([one.nll - one.nll_full for one in distances if one.nll is not None and one.nll_full is not None])


def _share(part: FloatVector, whole: FloatVector, draws: _Draws) -> Share | None:
    """Return which share of `whole` is not in `part`, or None where `whole` has a mean of 0."""
    gap = whole.mean()
    gaps = whole[draws].mean(1)
    possible = gaps != 0
    if gap == 0 or not possible.any():
        return None
    values = 1 - part[draws].mean(1)[possible] / gaps[possible]
    low, high = np.percentile(values, [2.5, 97.5])
    return Share(float(1 - part.mean() / gap), float(low), float(high))
