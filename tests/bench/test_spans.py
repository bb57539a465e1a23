"""Scores of spans against their definition by sets of characters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ragkit.bench.spans import covered_share, recall_and_iou, whole_share, within_budget

SPAN = st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.integers(1, 12)).map(lambda s: (s[0], s[1], s[1] + s[2]))


def characters(spans):
    return {(uri, place) for uri, start, stop in spans for place in range(start, stop)}


@given(retrieved=st.lists(SPAN, max_size=6), gold=st.lists(SPAN, min_size=1, max_size=4))
def test_recall_and_iou_are_those_of_sets_of_characters(retrieved, gold):
    wanted = characters(gold)
    covered = len(wanted & characters(retrieved))
    size = sum(stop - start for _, start, stop in retrieved)  # what overlaps is read twice
    recall, iou = recall_and_iou(retrieved, gold)
    assert recall == covered / len(wanted) == covered_share(retrieved, gold)
    assert iou == covered / (size + len(wanted) - covered)


@given(spans=st.lists(SPAN, max_size=6), budget=st.integers(1, 60))
def test_a_budget_is_used_up_to_the_last_character(spans, budget):
    kept = within_budget(spans, budget)
    assert sum(stop - start for _, start, stop in kept) == min(budget, sum(stop - start for _, start, stop in spans))
    assert [span[:2] for span in kept] == [span[:2] for span in spans[: len(kept)]]


def test_an_answer_in_two_pieces_is_not_whole():
    gold = [("a", 10, 20), ("a", 30, 40)]
    assert whole_share([("a", 5, 15), ("a", 15, 25), ("b", 30, 40)], gold) == 0
    assert whole_share([("a", 0, 20), ("b", 30, 40)], gold) == 0.5
