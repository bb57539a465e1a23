"""The breakpoint rules accept what their sources accept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ragkit.chunking.breakpoints import BreakpointRule, find_breakpoints, savitzky_golay
from ragkit.errors import UsageError

DISTANCES = np.array([0.1, 0.2, 0.1, 0.9, 0.1, 0.2, 0.3, 0.2, 0.1, 0.7])


def accepted(rule, amount, distances=DISTANCES):
    return np.flatnonzero(find_breakpoints(distances, rule, amount).accepted).tolist()


def test_the_percentile_rule_accepts_what_lies_above_the_percentile():
    assert accepted(BreakpointRule.PERCENTILE, 80) == [3, 9]
    assert accepted(BreakpointRule.PERCENTILE, 95) == [3]


def test_the_standard_deviation_rule_accepts_what_lies_far_above_the_mean():
    # Mean 0.29, deviation 0.264: one deviation above is 0.554, two are 0.817.
    assert accepted(BreakpointRule.STANDARD_DEVIATION, 1) == [3, 9]
    assert accepted(BreakpointRule.STANDARD_DEVIATION, 2) == [3]


def test_the_gradient_rule_accepts_the_steepest_rises():
    assert accepted(BreakpointRule.GRADIENT, 85) == [2, 9]


def test_the_local_minimum_rule_accepts_peaks_of_the_smoothed_distance_alone():
    row = np.array([0.1, 0.1, 0.2, 0.8, 0.9, 0.8, 0.2, 0.1, 0.1])
    assert accepted(BreakpointRule.LOCAL_MINIMUM, 50, row) == [4]
    assert accepted(BreakpointRule.PERCENTILE, 50, row) == [3, 4, 5]


def test_smoothing_leaves_a_cubic_as_it_is():
    cubic = np.polyval([0.5, -1, 2, 3], np.linspace(-2, 2, 20))
    assert savitzky_golay(cubic) == pytest.approx(cubic)


def test_smoothing_uses_the_published_weights():
    assert savitzky_golay(np.array([0.0, 0, 0, 1, 0, 0, 0]))[3] == pytest.approx(17 / 35)
    assert savitzky_golay(np.array([0.0, 0, 0, 1, 0, 0, 0]))[2] == pytest.approx(12 / 35)


@pytest.mark.parametrize("rule", list(BreakpointRule))
@pytest.mark.parametrize("count", [0, 1, 2, 4, 50])
def test_equal_distances_have_no_breakpoint(rule, count):
    found = find_breakpoints(np.full(count, 0.3), rule, 50)
    assert not found.accepted.any()
    assert len(found.log_odds) == count


@given(
    distances=hnp.arrays(np.float64, st.integers(0, 30), elements=st.floats(-1, 2)),
    rule=st.sampled_from(list(BreakpointRule)),
    amount=st.floats(0, 100),
)
def test_the_odds_are_positive_exactly_where_the_rule_accepts(distances, rule, amount):
    found = find_breakpoints(distances, rule, amount)
    assert np.isfinite(found.log_odds).all()
    assert ((found.log_odds > 0) == found.accepted).all()


def test_a_percentile_over_a_hundred_is_refused():
    with pytest.raises(UsageError, match="percentile from 0 to 100, got 101"):
        find_breakpoints(DISTANCES, BreakpointRule.PERCENTILE, 101)
