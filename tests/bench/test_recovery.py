"""Shares of the gap that plain reuse leaves, and their intervals."""

from __future__ import annotations

import pytest

from ragkit.bench.answer_distance import AnswerDistance
from ragkit.bench.recovery import recoveries


def distance(kl: float, nll: float | None = None, nll_full: float | None = None, same: float = 1.0) -> AnswerDistance:
    return AnswerDistance(kl, kl / 2, same, nll, nll_full, 0.15, kl)


def test_the_share_is_a_ratio_of_means_not_a_mean_of_ratios():
    prompts = [{"reuse": distance(1.0), "blend": distance(0.0)}, {"reuse": distance(3.0), "blend": distance(3.0)}]
    reuse, blend = recoveries(prompts, "reuse")
    assert reuse.recovered_first.value == 0
    assert blend.recovered_first.value == pytest.approx(1 - 1.5 / 2)
    assert blend.kl_mean == pytest.approx(0.75)
    assert blend.largest_logit_difference == 3.0


def test_the_interval_holds_the_share_and_shrinks_with_equal_prompts():
    varied = [{"reuse": distance(1.0), "blend": distance(kl)} for kl in (0.1, 0.9, 0.2, 0.5)]
    equal = [{"reuse": distance(1.0), "blend": distance(0.4)}] * 4
    wide, narrow = recoveries(varied, "reuse")[1].recovered_first, recoveries(equal, "reuse")[1].recovered_first
    assert wide.low < wide.value < wide.high
    assert (narrow.low, narrow.high) == pytest.approx((0.6, 0.6))


def test_prompts_are_drawn_as_pairs():
    """Where a blend leaves half of each prompt's gap, it leaves half of any draw's."""
    prompts = [{"reuse": distance(kl), "blend": distance(kl / 2)} for kl in (0.1, 5.0, 0.7)]
    share = recoveries(prompts, "reuse")[1].recovered_first
    assert (share.low, share.high) == pytest.approx((0.5, 0.5))


def test_no_gap_gives_no_share():
    assert recoveries([{"reuse": distance(0.0), "blend": distance(0.0)}], "reuse")[1].recovered_first is None


def test_the_gold_answers_likelihood_is_compared_with_full_prefills():
    prompts = [{"reuse": distance(1.0, 3.0, 2.0), "blend": distance(1.0, 2.25, 2.0)}]
    blend = recoveries(prompts, "reuse")[1]
    assert (blend.nll, blend.recovered_nll.value) == (2.25, pytest.approx(0.75))


def test_how_far_the_gold_answers_likelihood_moved_does_not_cancel_out():
    prompts = [
        {"reuse": distance(1.0, 4.0, 2.0), "blend": distance(1.0, 2.5, 2.0)},
        {"reuse": distance(1.0, 1.0, 3.0), "blend": distance(1.0, 2.5, 3.0)},
    ]
    reuse, blend = recoveries(prompts, "reuse")
    assert reuse.recovered_nll is None  # one up, one down: no gap on average
    assert (reuse.nll_moved, blend.nll_moved) == (2.0, 0.5)
    share = blend.recovered_nll_moved
    assert (share.value, share.low, share.high) == pytest.approx((0.75, 0.75, 0.75))


def test_prompts_without_a_gold_answer_do_not_count_in_its_likelihood():
    prompts = [
        {"reuse": distance(1.0, 3.0, 2.0), "blend": distance(1.0, 2.25, 2.0)},
        {"reuse": distance(1.0), "blend": distance(0.5)},
    ]
    blend = recoveries(prompts, "reuse")[1]
    assert (blend.prompts, blend.nll_moved) == (2, 0.25)
    assert blend.recovered_nll.value == blend.recovered_nll_moved.value == pytest.approx(0.75)


def test_without_gold_answers_there_is_no_likelihood():
    blend = recoveries([{"reuse": distance(1.0), "blend": distance(0.5)}], "reuse")[1]
    assert (blend.nll, blend.recovered_nll, blend.nll_moved, blend.recovered_nll_moved) == (None,) * 4


def test_first_tokens_that_agree_are_counted():
    prompts = [{"reuse": distance(1.0, same=same)} for same in (1.0, 0.0, 0.0, 1.0)]
    assert recoveries(prompts, "reuse")[0].agrees_first == 0.5


def test_nothing_measured_is_no_rows():
    assert recoveries([], "reuse") == []
