"""The Viterbi split is optimal, holds the cap and looks no further back than it must."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.chunking.length_constrained import (
    FORBIDDEN,
    ClippedPolynomialPrior,
    GaussianPrior,
    LengthPrior,
    LogNormalPrior,
    UniformPrior,
    best_cuts,
    first_starts,
)
from ragkit.errors import ChunkingError, UsageError

PRIORS = [UniformPrior(), UniformPrior(4), GaussianPrior(6, 2), LogNormalPrior(6, 0.5), ClippedPolynomialPrior(6, 4)]


def ends_and_starts(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(sizes)
    return ends, ends - sizes


def total(cuts: list[int], scores: list[float], sizes: list[int], cap: int, prior: LengthPrior) -> float | None:
    """The objective of one way to cut, or None where it breaks the cap."""
    edges = [0, *cuts, len(sizes)]
    value = sum(scores[cut - 1] for cut in cuts)
    for start, stop in pairwise(edges):
        tokens = sum(sizes[start:stop])
        if stop - start > 1 and (tokens > cap or stop - start > cap):
            return None
        value += float(prior.log_prior(np.array([tokens]))[0])
    return value


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    cap=st.integers(1, 20),
    prior=st.sampled_from(PRIORS),
    data=st.data(),
)
def test_no_other_way_to_cut_scores_higher(sizes, cap, prior, data):
    scores = data.draw(st.lists(st.floats(-5, 5), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    found = best_cuts(scores, *ends_and_starts(sizes), cap, prior).tolist()
    inner = range(1, len(sizes))
    every = [list(cuts) for count in range(len(sizes)) for cuts in combinations(inner, count)]
    values = [value for cuts in every if (value := total(cuts, scores, sizes, cap, prior)) is not None]
    assert total(found, scores, sizes, cap, prior) == pytest.approx(max(values), abs=1e-9)


def test_log_odds_cut_exactly_where_they_are_positive_when_the_cap_is_out_of_reach():
    odds = np.random.default_rng(0).normal(size=199)
    cuts = best_cuts(odds, *ends_and_starts([3] * 200), 10_000)
    assert cuts.tolist() == (np.flatnonzero(odds > 0) + 1).tolist()


def test_under_the_cap_the_weakest_boundaries_are_given_up():
    # Six units of 4 tokens under a cap of 12: two cuts would do evenly, but the likeliest pair that fits is 2 and 4.
    scores = np.log([0.1, 0.9, 0.2, 0.8, 0.1])
    assert best_cuts(scores, *ends_and_starts([4] * 6), 12).tolist() == [2, 4]


@pytest.mark.parametrize(
    ("prior", "at_target", "beside"),
    [
        (GaussianPrior(10, 2), 0.0, -0.5),
        (LogNormalPrior(10, np.log(1.2)), 0.0, -0.5),
        (ClippedPolynomialPrior(10, 4), 0.0, np.log(0.75)),
    ],
)
def test_priors_have_the_published_shapes(prior, at_target, beside):
    assert prior.log_prior(np.array([10, 12])) == pytest.approx([at_target, beside])


def test_a_clipped_polynomial_forbids_what_it_clips():
    assert ClippedPolynomialPrior(10, 4).log_prior(np.array([14]))[0] <= FORBIDDEN


def test_a_gaussian_prior_makes_chunks_of_the_target_length():
    cuts = best_cuts(np.full(99, -1.0), *ends_and_starts([1] * 100), 50, GaussianPrior(20, 1))
    assert cuts.tolist() == [20, 40, 60, 80]


def test_a_minimum_is_kept_wherever_the_cap_lets_it():
    cuts = best_cuts(np.full(9, 5.0), *ends_and_starts([2] * 10), 8, UniformPrior(min_tokens=4))
    assert cuts.tolist() == [2, 4, 6, 8]


def test_a_unit_over_the_cap_is_a_chunk_of_its_own():
    assert best_cuts([-1.0, -1.0], *ends_and_starts([2, 90, 2]), 10).tolist() == [1, 2]


def test_tokens_that_a_cut_saves_count_for_the_cap():
    # The space at each boundary is a token only inside a chunk: 5 + 5 tokens in one chunk are 11 from end to start.
    assert best_cuts([-1.0], [5, 11], [0, 6], 11).tolist() == []
    assert best_cuts([-1.0], [5, 11], [0, 6], 10).tolist() == [1]


def test_many_units_without_tokens_do_not_widen_the_window_beyond_the_cap():
    first = first_starts(np.zeros(1000, np.int64), np.zeros(1000, np.int64), 16)
    assert int((np.arange(1000) - first).max()) == 15


def test_windows_wider_than_a_block_give_the_same_cuts(monkeypatch):
    scores = np.random.default_rng(1).normal(-1, 1, size=499)
    arguments = (scores, *ends_and_starts(np.random.default_rng(2).integers(1, 9, size=500).tolist()), 60)
    whole = best_cuts(*arguments, GaussianPrior(40, 9)).tolist()
    monkeypatch.setattr("ragkit.chunking.length_constrained._BLOCK", 7)
    assert best_cuts(*arguments, GaussianPrior(40, 9)).tolist() == whole


def test_one_unit_and_no_unit_need_no_cut():
    assert best_cuts([], [3], [0], 5).tolist() == []
    assert best_cuts([], [], [], 5).tolist() == []


def test_a_score_that_is_nan_is_named():
    with pytest.raises(ChunkingError, match="before unit 2 is NaN"):
        best_cuts([0.0, np.nan], *ends_and_starts([1, 1, 1]), 5)


def test_a_prior_without_a_spread_is_refused():
    with pytest.raises(UsageError, match="got 10 and 0"):
        GaussianPrior(10, 0)
