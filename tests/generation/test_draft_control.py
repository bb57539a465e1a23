import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.errors import ConfigError
from ragkit.generation.draft_control import DraftController, DraftLimits, expected_tokens
from ragkit.generation.draft_costs import DraftRecord, MeasuredCosts, NominalCosts
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import DraftBudget, DraftPrice

LIMITS = DraftLimits(depth=8, nodes=16)
LAGS = [(1, 0.0), (100, 9.0), (200, 3.0), (200, 9.0)]  # tokens behind, and what reading many took
CHAIN = DraftTree.chain(range(8))


class Known:
    """A step of 1, a node more of `node`; a draft of what the session says."""

    def __init__(self, node):
        self.node = node

    def of_pass(self, context, nodes, requests=1):
        return 1 + self.node * nodes

    prefill_share, catch_up = 0.005, 2.0

    def of_draft(self, measured_ms, share, context, requests=1):
        return measured_ms or share

    def note(self, context, nodes, ms, requests=1):
        pass

    def record(self, drafter):
        return DraftRecord()


def trained(controller, accepted, passes=60, depth=8):
    for _ in range(passes):
        controller.observe(DraftTree.chain(range(depth)), accepted, 100, 1.0)
    return controller


def budget(controller, step, remaining=100, room=100, lag=0):
    return controller.budget(100, remaining, room, step_ms=step, lag=lag)


def rate(acceptance, length, node, step):
    return expected_tokens(acceptance, length) / (1 + length * (node + step))


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(("node", "step"), [(0.01, 0.1), (0.05, 0.3), (0.0, 0.5)])
def test_the_depth_is_what_the_formula_gives_for_the_acceptance_at_hand(acceptance, node, step, monkeypatch):
    controller = DraftController(Known(node), LIMITS)
    monkeypatch.setattr(controller, "acceptances", lambda count: [acceptance] * count)
    best = max(range(9), key=lambda length: rate(acceptance, length, node, step))
    if rate(acceptance, best, node, step) > 1.02:
        assert budget(controller, step).depth == best


def test_acceptance_is_that_of_the_last_passes_depth_by_depth():
    controller = trained(DraftController(Known(0.01), LIMITS), 3)
    assert [round(controller.acceptance(depth), 1) for depth in (0, 1, 2)] == [1.0, 1.0, 1.0]
    assert controller.acceptance(3) < 0.1
    trained(controller, 0)
    assert controller.acceptance(0) < 0.15


def answered(controller, step, tokens, stands=0, lag=1):
    """Return how many tokens were drafted in each pass of an answer, of which `stands` stood."""
    asked = []
    for at in range(tokens):
        asked.append(budget(controller, step, tokens - at, lag=lag).depth)
        controller.observe(DraftTree.chain(range(asked[-1])), min(stands, asked[-1]), 100, 1.0)
    return asked


@pytest.mark.parametrize("lag", [1, 40, 200])
@pytest.mark.parametrize("step", [0.2, 0.5, 0.9])
def test_where_drafts_do_not_pay_single_tokens_are_probed_that_lose_a_hundredth_of_the_answer(step, lag):
    costs = Known(0.05)
    controller = trained(DraftController(costs, LIMITS), 0)
    tokens = 400
    asked = answered(controller, step, tokens, lag=lag)
    assert set(asked) == {0, 1}
    behind = {1: 0.0, 40: step * (1 + 38 * 0.005), 200: 2.0}[lag]
    loss = step + costs.of_pass(100, 1) - 1 + behind
    assert 0.005 * tokens < sum(asked) * loss <= 0.01 * (tokens + 128)


def test_what_a_catching_up_took_says_when_the_next_is_worth_a_probe():
    controller = trained(DraftController(Known(0.0), LIMITS), 0)
    trained(controller, 0, passes=400, depth=0)  # what may be lost has grown to the most
    asked = [controller.budget(100, 100, 100, 0.5, lag=lag, behind_ms=ms).depth for lag, ms in LAGS]
    assert asked == [1, 1, 1, 0]


def test_a_decision_not_to_draft_holds_for_some_passes_of_as_many_requests():
    controller = trained(DraftController(Known(0.05), LIMITS), 0)
    while controller.budget(100, 100, 100, 0.9).depth:
        controller.observe(DraftTree.chain([1]), 0, 100, 1.0)
    assert [controller.rests() for _ in range(10)] == [True] * 8 + [False] * 2
    assert not controller.budget(100, 100, 100, 0.9).depth
    assert not controller.rests(2)
    assert not DraftController(Known(0.05), LIMITS).rests()


def test_drafts_that_seem_to_pay_and_lose_are_ended():
    lost, controller = 0.0, DraftController(Known(0.0), LIMITS)
    for at in range(60):  # two passes of three bring nothing, which the mean of all depths hides
        asked = 0 if controller.rests() else controller.budget(100, 200 - at, 100, 0.7).depth
        controller.observe(DraftTree.chain(range(asked)), int(asked > 0 and at % 3 == 0), 100, 1.0)
        lost += asked * 0.7 - (asked > 0 and at % 3 == 0)
    assert lost < 0.02 * 128 + 0.01 * 60 + 1.0


def test_a_dear_first_token_does_not_hide_that_longer_drafts_pay():
    controller = DraftController(Known(0.0), LIMITS)
    assert controller.budget(100, 100, 100, 0.3, first_ms=0.6).depth >= 2
    assert DraftController(Known(0.0), LIMITS).budget(100, 100, 100, 0.6).depth == 1


def test_a_further_token_is_priced_by_what_is_read_until_a_draft_had_several():
    controller = DraftController(Known(0.0), LIMITS)
    assert controller.budget(100, 100, 100, 0.0, 0.3, first_ms=0.6).depth >= 2
    assert DraftController(Known(0.0), LIMITS).budget(100, 100, 100, 0.0, 0.9, first_ms=0.6).depth == 1


def test_probes_that_show_better_drafts_pay_for_the_next_ones_and_soon_drafting_goes_on():
    controller = trained(DraftController(Known(0.01), LIMITS), 0)
    answered(controller, 0.2, 60)
    asked = answered(controller, 0.2, 60, stands=8)
    assert asked[40:50] == [8] * 10


@pytest.mark.parametrize(("share", "stood"), [(0.3, None), (0.7, None), (0.9, 0.9), (0.94, 0.9), (0.97, 1), (1.2, 1)])
def test_a_drafter_that_would_not_pay_if_all_or_most_stood_is_not_begun(share, stood):
    controller = DraftController(NominalCosts(), DraftLimits(depth=16))
    rate = max(expected_tokens(stood or 0.9, n) / (n * share + 1 + 0.02 * n) for n in range(1, 17))
    reason = controller.reason_not_to_begin(DraftPrice(step_share=share), 1000, 200)
    assert (stood is None) == (rate > 1.03) == (reason == "")
    assert stood is None or f"{rate:.2f} times as fast" in reason


def test_a_drafter_whose_prompt_takes_longer_to_read_than_it_can_save_is_not_begun():
    controller, costs = DraftController(NominalCosts(), DraftLimits(depth=16)), NominalCosts()
    saved = 128 * (1 - 1 / max(expected_tokens(0.9, n) / (n * 0.52 + 1) for n in range(1, 17)))
    tokens = int(saved / costs.prefill_share)
    assert not controller.reason_not_to_begin(DraftPrice(0.0, 0.5, 0.0, tokens), 1000, 200)
    assert "reading its prompt takes" in controller.reason_not_to_begin(DraftPrice(0, 0.5, 0, tokens + 300), 1000, 200)
    assert "reading its prompt takes" in controller.reason_not_to_begin(DraftPrice(0, 0.5, 0, tokens), 1000, 60)


def test_a_drafter_that_brought_little_so_far_is_begun_only_where_that_pays():
    costs, price = MeasuredCosts("cuda"), DraftPrice(step_share=0.6)
    assert not DraftController(costs, LIMITS, 1, "self").reason_not_to_begin(price, 1000, 200)
    for _ in range(200):
        costs.record("self").note(4, 1, 1.0)
    assert costs.record("self").acceptance == pytest.approx(0.5, abs=0.02)
    assert DraftController(costs, LIMITS, 1, "self").reason_not_to_begin(price, 1000, 200)
    assert not DraftController(costs, LIMITS, 1, "other").reason_not_to_begin(price, 1000, 200)


def test_the_first_length_is_by_what_is_read_as_long_as_no_step_was_measured():
    costs = MeasuredCosts("cuda")
    for _ in range(3):
        costs.note(1000, 0, 10.0)
    for step_ms, share in ((0.0, 0.2), (2.0, 5.0), (0.0, 2.0)):
        controller = DraftController(costs, LIMITS)
        draft = (step_ms or 10 * share) / 10
        rates = [expected_tokens(0.7, n) / (n * draft + costs.of_pass(1000, n) / 10) for n in range(9)]
        best = max(range(9), key=rates.__getitem__)
        wanted = controller.budget(1000, 100, 100, step_ms, share).depth
        assert wanted == best if rates[best] > 1.02 else wanted <= 1


def test_retrieving_anew_must_be_won_back():
    controller = trained(DraftController(Known(0.01), LIMITS), 4)
    trained(controller, 0, passes=50)
    assert controller.wants_refresh
    assert controller.pays_to_refresh(DraftPrice(0.2), 100, 200)
    controller.refreshed(90.0)  # as long as 90 steps
    trained(controller, 4)
    trained(controller, 0, passes=50)
    assert controller.wants_refresh
    assert not controller.pays_to_refresh(DraftPrice(0.2), 100, 100)


@given(st.integers(0, 12), st.integers(0, 12))
def test_no_draft_reaches_beyond_the_answer_or_the_rows_that_are_left(remaining, room):
    given_budget = budget(DraftController(Known(0.0), LIMITS), 0.001, remaining, room)
    assert given_budget.depth <= max(0, remaining - 1)
    assert given_budget.depth <= given_budget.nodes <= room


def test_a_tree_is_cut_to_the_nodes_that_bring_most():
    tree = DraftTree((1, 2, 3, 4), (-1, 0, 1, 0), chances=(0.9, 0.8, 0.3, 0.04))
    rates = [1.0, 1.9 / 1.1, 2.7 / 1.2, 3.0 / 1.3, 3.04 / 1.4]
    assert max(range(5), key=rates.__getitem__) == 3
    assert DraftController(Known(0.1), LIMITS).cut(tree, 100).token_ids == (1, 2, 3)
    assert len(DraftController(Known(2.0), LIMITS).cut(tree, 100)) == 0


def test_a_drafter_that_promises_too_much_is_trusted_less():
    tree = DraftTree((1,), (-1,), chances=(0.5,))
    controller = DraftController(Known(0.2), LIMITS)
    assert len(controller.cut(tree, 100)) == 1
    for _ in range(60):
        controller.budget(100, 100, 100)
        controller.observe(controller.cut(tree, 100), 0, 100, 1.0)
    assert controller.trust < 0.5
    verified = []
    for _ in range(200):
        controller.budget(100, 100, 100)
        verified.append(controller.cut(tree, 100))
        controller.observe(verified[-1], 0, 100, 1.0)
    assert 5 <= sum(map(len, verified)) <= 10  # a fifth of a step is lost by each, and may be a hundredth of all


def test_a_fixed_length_is_always_drafted():
    controller = trained(DraftController(Known(5.0), DraftLimits(8, 16, length=5)), 0)
    assert budget(controller, 9.0).depth == 5
    assert controller.cut(CHAIN, 100) is CHAIN


def test_other_chunks_are_asked_for_once_where_acceptance_falls():
    controller = trained(DraftController(Known(0.0), LIMITS), 4)
    assert not controller.wants_refresh
    trained(controller, 0, passes=50)
    assert controller.wants_refresh
    controller.refreshed()
    trained(controller, 0, passes=60)
    assert not controller.wants_refresh


def test_measured_passes_are_told_apart_by_context_requests_and_nodes():
    costs = MeasuredCosts()
    for _ in range(60):
        costs.note(1000, 0, 10.0)
        costs.note(1000, 8, 14.0)
        costs.note(8000, 0, 50.0)
        costs.note(1000, 0, 20.0, requests=4)
    assert costs.of_pass(1000, 0) == pytest.approx(10.0)
    assert costs.of_pass(1000, 4) == pytest.approx(12.0)
    assert costs.of_pass(8000, 0) == pytest.approx(50.0)
    assert costs.of_pass(1000, 0, requests=4) == pytest.approx(20.0)
    assert costs.of_pass(8000, 8) == pytest.approx(50.0 * 1.64)
    assert costs.of_draft(7.0, 0.4, 8000) == 7.0
    assert costs.of_draft(0.0, 0.4, 8000) == pytest.approx(20.0)


def test_passes_on_a_gpu_cost_what_the_next_recorded_size_costs():
    costs = MeasuredCosts("cuda")
    for _ in range(2):
        costs.note(1000, 0, 10.0)
        costs.note(1000, 9, 11.0)
    assert [costs.of_pass(1000, nodes) for nodes in (8, 12, 15)] == [11.0] * 3
    assert costs.of_pass(1000, 16) == pytest.approx(11.0 * 1.205 / 1.125)


def test_the_first_pass_of_a_kind_and_outliers_count_little():
    costs = MeasuredCosts("cuda")
    costs.note(1000, 0, 900.0)  # compiles
    for _ in range(30):
        costs.note(1000, 0, 10.0)
    costs.note(1000, 0, 5000.0)
    assert costs.of_pass(1000, 0) == pytest.approx(14.0)


def test_nothing_known_is_priced_in_steps():
    assert MeasuredCosts("cuda").of_pass(1000, 0) == 1.0
    assert MeasuredCosts("cuda").of_pass(1000, 10) == pytest.approx(1.125)
    assert MeasuredCosts("cpu").of_pass(1000, 10) == pytest.approx(1.8)
    assert NominalCosts().of_pass(1000, 10) == pytest.approx(1.2)
    assert NominalCosts().of_draft(123.0, 0.4, 1000) == 0.4
    assert MeasuredCosts("cuda").of_draft(123.0, 0.4, 1000) == 0.4  # what a plain step takes is not known


def test_expected_tokens_are_those_of_the_paper():
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.8, 4) == pytest.approx(sum(0.8**at for at in range(5)))
    with pytest.raises(ConfigError, match=r"acceptance must lie in \[0, 1\]"):
        expected_tokens(1.5, 2)


@pytest.mark.parametrize("limits", [(0, 4, 0), (5, 4, 0), (4, 8, 5), (4, 8, -1)])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(ConfigError):
        DraftLimits(*limits)


# ------------------------------------------------------------------- whole answers by a fixed table of what passes cost


class Table(Known):
    """Steps of an 8B model behind a long prompt: a pass reads as much as a step, and is padded to a recorded size."""

    def __init__(self, scale=1.0, passes=((0, 1.0), (3, 1.04), (15, 1.05), (31, 1.1))):
        super().__init__(0.0)
        self._scale, self._passes = scale, passes

    def of_pass(self, context, nodes, requests=1):
        return self._scale * next(cost for most, cost in self._passes if nodes <= most)


def ceiling(acceptance, draft, costs, first=0.0):
    """Return tokens a step of the best fixed length, of all there are."""
    plain, more = costs.of_pass(0, 0), (first or draft) - draft
    return max(
        expected_tokens(acceptance, length) * plain / (more * (length > 0) + length * draft + costs.of_pass(0, length))
        for length in range(17)
    )


def speed(acceptance, draft, costs, known=None, tokens=400, seeds=12, first=0.0, warm_up=0):
    """Return tokens a step of answers whose lengths the controller chooses, by the costs that it knows.

    A drafter that costs nothing tells its chances, as lookup does. The first tokens of each answer do not count.
    """
    plain, more = costs.of_pass(0, 0), (first or draft) - draft
    brought, spent = 0, 0.0
    for seed in range(seeds):
        chance = random.Random(seed)
        controller = DraftController(known or costs, DraftLimits(depth=16))
        done, lag = 0, 1
        while done < tokens:
            given_budget = DraftBudget(0, 0)
            if not controller.rests():
                given_budget = controller.budget(1000, tokens - done + 20, 31, draft, 0.0, 1, lag, first)
            tree = DraftTree.chain(range(min(16, given_budget.depth)))
            if draft == 0:
                chances = tuple(acceptance**depth for depth in range(1, 17))
                tree = controller.cut(dataclasses.replace(tree, chances=chances), 1000)
            stands = 0
            while stands < len(tree) and chance.random() < acceptance:
                stands += 1
            cost = costs.of_pass(0, len(tree)) + len(tree) * draft
            if len(tree) and draft:
                cost += more + (costs.catch_up * plain if lag > 32 else draft * max(0, lag - 2) * 0.005)
            controller.observe(tree, stands, 1000, cost)
            if done >= warm_up:
                brought += stands + 1
                spent += cost
            done += stands + 1
            lag = 2 if len(tree) else lag + 1
    return brought * plain / spent


@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.8, 0.95])
def test_lengths_of_what_costs_nothing_come_near_the_best_of_all_fixed_lengths(acceptance):
    best = ceiling(acceptance, 0.0, Table())
    assert speed(acceptance, 0.0, Table()) > 0.95 * best
    assert best > 1.15


@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("draft", [0.2, 0.34, 0.46, 0.6, 0.78, 0.94])
def test_lengths_of_a_model_come_near_the_best_of_all_fixed_lengths_and_never_far_below_plain_steps(acceptance, draft):
    got = speed(acceptance, draft, Table())
    assert got > 0.91 * ceiling(acceptance, draft, Table())
    assert got > 0.98


# Plain steps by tokens before, of a pass as measured at the shape of Llama 3 8B on an H100; then of a draft's tokens.
PASSES = {
    8192: ((0, 1.0), (1, 1.04), (3, 1.05), (7, 1.09), (15, 1.13), (31, 1.23)),
    32768: ((0, 1.0), (1, 1.01), (3, 1.02), (7, 1.05), (15, 1.11), (31, 1.26)),
    130560: ((0, 1.0), (1, 1.035), (3, 1.04), (7, 1.06), (15, 1.15), (31, 1.43)),
}
PLAIN_MS = {8192: 6.93, 32768: 8.43, 130560: 12.9}


@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(("first", "further"), [(7.43, 6.55), (6.52, 4.73)])
@pytest.mark.parametrize("context", PASSES)
def test_at_measured_costs_what_follows_an_answers_first_tokens_is_nowhere_slower(context, first, further, acceptance):
    costs, plain = Table(passes=PASSES[context]), PLAIN_MS[context]
    first, further = first / plain, further / plain
    got = speed(acceptance, further, costs, tokens=256, seeds=24, first=first, warm_up=48)
    assert got > 0.98
    if context == 130560 and acceptance == 0.8:
        assert got > 0.93 * ceiling(acceptance, further, costs, first)


@pytest.mark.parametrize("acceptance", [0.5, 0.8])
def test_lengths_are_found_where_costs_have_to_be_measured(acceptance):
    true = Table(scale=14.0)
    assert speed(acceptance, 0.0, true, MeasuredCosts("cuda")) > 0.94 * ceiling(acceptance, 0.0, true)
