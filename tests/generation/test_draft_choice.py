"""How many nodes of all requests' trees one pass verifies."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.generation.draft_choice import nodes_worth_probing, nodes_worth_verifying

falling = st.lists(st.floats(0.01, 1), max_size=4).map(lambda chances: sorted(chances, reverse=True))


def line(node: float, most: int = 8) -> list[float]:
    """Return costs of passes over 0 to `most` nodes of each request, each node adding `node` of a plain step."""
    return [1 + node * count for count in range(most + 1)]


def test_one_request_gets_what_brings_most_tokens_in_a_time():
    assert nodes_worth_verifying([[0.9, 0.8, 0.2, 0.1]], line(0.05), is_padded=False) == [3]
    assert nodes_worth_verifying([[0.9, 0.8, 0.2, 0.1]], line(0.6), is_padded=False) == [2]
    assert nodes_worth_verifying([[0.9, 0.8, 0.2, 0.1]], line(1.0), is_padded=False) == [0]


def test_a_likely_draft_of_one_is_verified_although_others_have_none():
    assert nodes_worth_verifying([[0.9, 0.9], [], [], []], line(0.4), is_padded=False) == [2, 0, 0, 0]


def test_where_places_are_padded_one_draft_must_pay_for_all():
    assert nodes_worth_verifying([[0.9, 0.9], [], [], []], line(0.4), is_padded=True) == [0, 0, 0, 0]
    assert nodes_worth_verifying([[0.9, 0.9]] * 4, line(0.4), is_padded=True) == [2, 2, 2, 2]
    assert nodes_worth_verifying([[0.9, 0.9], [0.5]], line(0.2), is_padded=True) == [2, 1]


def test_drafting_pays_less_the_more_a_pass_is_bound_by_computing():
    chances, kept = [[0.9, 0.8, 0.7, 0.6]] * 8, []
    for node in (0.05, 0.4, 0.6, 1.2):
        kept.append(sum(nodes_worth_verifying(chances, line(node), is_padded=False)))
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (32, 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(falling, min_size=1, max_size=3), st.floats(0.01, 2.0))
def test_no_other_choice_of_first_nodes_brings_more(chances, node):
    requests, costs = len(chances), line(node)

    def rate(counts):
        tokens = requests + sum(sum(one[:count]) for one, count in zip(chances, counts, strict=True))
        return tokens / (1 + node * sum(counts) / requests)

    kept = nodes_worth_verifying(chances, costs, is_padded=False)
    best = max(rate(counts) for counts in product(*(range(len(one) + 1) for one in chances)))
    plain = requests
    assert rate(kept) == pytest.approx(best) or (not any(kept) and best <= 1.02 * plain + 1e-9)


def probed(chances, hopes, node, allowed, *, is_padded):
    costs = line(node)
    kept = nodes_worth_verifying(chances, costs, is_padded=is_padded)
    return nodes_worth_probing(chances, hopes, kept, costs, allowed, is_padded=is_padded)


def test_first_nodes_that_would_pay_were_they_trusted_are_probed_the_least_doubted_first():
    chances, hopes = [[0.9], [0.01], [0.02], [0.03]], [[0.9], [0.8], [0.8], [0.1]]
    assert probed(chances, hopes, 0.2, 1.0, is_padded=False) == ([1, 2], pytest.approx(0.1))
    assert probed(chances, hopes, 0.2, 0.06, is_padded=False) == ([2], pytest.approx(0.05))
    assert probed(chances, hopes, 0.2, 0.04, is_padded=False) == ([], 0.0)


def test_where_places_are_padded_all_are_probed_together_or_none():
    chances, hopes = [[0.01], [0.02], [], [0.03]], [[0.8], [0.8], [], [0.4]]
    assert probed(chances, hopes, 0.2, 0.2, is_padded=True) == ([0, 1, 3], pytest.approx(0.2))
    assert probed(chances, hopes, 0.2, 0.19, is_padded=True) == ([], 0.0)


@pytest.mark.parametrize("is_padded", [False, True])
def test_nothing_is_probed_that_would_not_pay_or_that_has_no_chances_of_its_own(is_padded):
    assert probed([[0.01], [0.02]], [[0.1], [0.1]], 0.2, 9.0, is_padded=is_padded) == ([], 0.0)
    assert probed([[0.01], [0.02]], [[], []], 0.2, 9.0, is_padded=is_padded) == ([], 0.0)
    assert probed([[0.01], [0.02]], [[0.9], [0.9]], 0.2, 0.0, is_padded=is_padded) == ([], 0.0)
