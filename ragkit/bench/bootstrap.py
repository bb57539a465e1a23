"""How sure a difference between two systems on the same items is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of `a - b` and its 95% percentile interval over resampled pairs.

    `a[i]` and `b[i]` are scores of two systems on the same item. Source: Efron and Tibshirani, An Introduction to
    the Bootstrap (1993), chapter 13.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired_bootstrap needs two equally long, non-empty sequences, got {len(a)} and {len(b)}")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    generator = np.random.default_rng(seed)
    size = len(differences)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // size)  # bounds the index matrix at 32 MB
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = differences[generator.integers(0, size, size=(stop - start, size))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def mean_bootstrap(
    groups: Sequence[Sequence[float]], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of the groups' means and its 95% percentile interval, items resampled within each group.

    Raises:
        ValueError: there is no group, or an empty one.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError(f"mean_bootstrap needs groups with items, got sizes {[len(group) for group in groups]}")
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for group in groups:
        scores = np.asarray(group, dtype=np.float64)
        step = max(1, 4_000_000 // len(scores))
        for start in range(0, resamples, step):
            stop = min(start + step, resamples)
            drawn = generator.integers(0, len(scores), size=(stop - start, len(scores)))
            means[start:stop] += scores[drawn].mean(axis=1) / len(groups)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean([np.mean(group) for group in groups])), float(low), float(high)
