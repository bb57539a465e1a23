import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.errors import ConfigError
from ragkit.generation.draft_control import (
    DraftController,
    DraftLimits,
    MeasuredCosts,
    NominalCosts,
    expected_tokens,
)
from ragkit.generation.draft_tree import DraftTree

LIMITS = DraftLimits(depth=8, nodes=16)
CHAIN = DraftTree.chain(range(8))


class Known:
    """A step of 1, a node more of `node`; a draft of what the session says."""

    def __init__(self, node):
        self.node = node

    def of_pass(self, context, nodes, requests=1):
        return 1 + self.node * nodes

    def of_draft(self, measured_ms, share):
        return measured_ms

    def note(self, context, nodes, ms, requests=1):
        pass


def trained(controller, accepted, passes=60, depth=8):
    for _ in range(passes):
        controller.observe(DraftTree.chain(range(depth)), accepted, 100, 1.0)
    return controller


def budget(controller, step, remaining=100, room=100):
    return controller.budget(100, remaining, room, step_ms=step)


def rate(acceptance, length, node, step):
    return expected_tokens(acceptance, length) / (1 + length * (node + step))


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(("node", "step"), [(0.01, 0.1), (0.05, 0.3), (0.0, 0.5)])
def test_the_depth_is_what_the_formula_gives_for_the_acceptance_at_hand(acceptance, node, step, monkeypatch):
    controller = DraftController(Known(node), LIMITS)
    monkeypatch.setattr(controller, "acceptance", lambda depth: acceptance)
    best = max(range(9), key=lambda length: rate(acceptance, length, node, step))
    if rate(acceptance, best, node, step) > 1.02:
        assert budget(controller, step).depth == best


def test_acceptance_is_that_of_the_last_passes_depth_by_depth():
    controller = trained(DraftController(Known(0.01), LIMITS), 3)
    assert [round(controller.acceptance(depth), 1) for depth in (0, 1, 2)] == [1.0, 1.0, 1.0]
    assert controller.acceptance(3) < 0.1
    trained(controller, 0)
    assert controller.acceptance(0) < 0.1


def test_where_drafts_do_not_pay_they_are_only_probed_ever_more_rarely():
    controller = trained(DraftController(Known(0.05), LIMITS), 0)
    asked = [budget(controller, 0.5).depth for _ in range(200)]
    probes = [index for index, depth in enumerate(asked) if depth]
    assert all(asked[index] == 2 for index in probes)
    assert [late - early for early, late in itertools.pairwise(probes)] == [9, 17, 33, 65]


def test_a_probe_that_shows_better_drafts_ends_the_pause():
    controller = trained(DraftController(Known(0.01), LIMITS), 0)
    assert budget(controller, 0.2).depth == 2
    trained(controller, 8)
    while budget(controller, 0.2).depth == 0:
        pass
    assert budget(controller, 0.2).depth == 8


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
        controller.observe(tree, 0, 100, 1.0)
    assert len(controller.cut(tree, 100)) == 0


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


def test_the_first_pass_of_a_kind_and_outliers_count_little():
    costs = MeasuredCosts("cuda")
    costs.note(1000, 0, 900.0)  # compiles
    for _ in range(30):
        costs.note(1000, 0, 10.0)
    costs.note(1000, 0, 5000.0)
    assert costs.of_pass(1000, 0) == pytest.approx(14.0)


def test_nothing_known_is_priced_in_steps():
    assert MeasuredCosts("cuda").of_pass(1000, 10) == pytest.approx(1.2)
    assert MeasuredCosts("cpu").of_pass(1000, 10) == pytest.approx(1.8)
    assert NominalCosts().of_pass(1000, 10) == pytest.approx(1.2)
    assert NominalCosts().of_draft(123.0, 0.4) == 0.4


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
