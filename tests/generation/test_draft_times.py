import pytest

from ragkit.generation.draft_times import StepTimes


def noted(*drafts):
    times = StepTimes()
    for steps, ms, pending in drafts:
        times.note(steps, ms, pending)
    return times


def test_the_first_token_is_told_apart_from_further_ones():
    times = noted(*[(1, 6.5, 1)] * 3, *[(3, 16.1, 2)] * 3)
    assert (times.first_ms, times.step_ms) == pytest.approx((6.5, 4.8))


def test_further_tokens_are_unknown_before_a_draft_had_several():
    assert noted(*[(1, 6.5, 1)] * 3).step_ms == 0.0


def test_drafts_of_several_tokens_alone_tell_their_mean():
    times = noted(*[(4, 20.0, 1)] * 3)
    assert (times.first_ms, times.step_ms) == pytest.approx((5.0, 5.0))


def test_the_first_draft_of_a_kind_does_not_count():
    assert noted((1, 900.0, 1)).first_ms == 0.0
    assert noted((1, 900.0, 1), (1, 6.0, 1)).first_ms == 6.0


def test_reading_much_beforehand_is_told_apart_and_some_passes_change_nothing():
    times = noted(*[(1, 6.0, 1)] * 2, (1, 30.0, 40), *[(1, 46.0, 200)] * 2)
    assert (times.first_ms, times.behind_ms) == pytest.approx((6.0, 40.0))
