"""Common beginnings against brute force on small sets of prompts."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from ragkit.generation.chunk_order import common_chunks_first
from ragkit.generation.prefix_groups import PrefixTree, one_level_groups, plan_prefixes
from ragkit.types import Prompt, Segment

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)


def common(prompts: list[list[int]]) -> int:
    """Tokens that all of them begin with, each keeping one of its own."""
    most = min(len(one) for one in prompts) - 1
    return next((at for at in range(most) if len({one[at] for one in prompts}) > 1), most)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for index, part in enumerate(parts):
            yield [*parts[:index], [first, *part], *parts[index + 1 :]]


def saved(prompts: list[list[int]], groups: list[list[int]]) -> int:
    return sum(common([prompts[one] for one in group]) * (len(group) - 1) for group in groups if len(group) > 1)


@given(PROMPTS)
def test_groups_save_as_many_tokens_as_the_best_of_all_partitions(prompts):
    groups = one_level_groups(PrefixTree.of(prompts))
    assert sorted(one for group in groups for one in group.members) == list(range(len(prompts)))
    best = max(saved(prompts, parts) for parts in partitions(list(range(len(prompts)))))
    assert saved(prompts, [list(group.members) for group in groups]) == best
    for group in groups:
        if len(group.members) > 1:
            assert group.prefix_tokens == common([prompts[one] for one in group.members])


@given(PROMPTS)
def test_each_token_of_the_tree_is_computed_once(prompts):
    plan = plan_prefixes(prompts, [1] * len(prompts), least_tokens=1)
    computed = sum(one.stop - one.start for one in plan.shared)
    computed += sum(len(prompt) - plan.shared_tokens(at) for at, prompt in enumerate(prompts))
    # Every prompt computes its last token itself; what stands before is computed once for each distinct beginning,
    # unless a prompt ends there, behind which nobody looks for shared rows.
    distinct = {tuple(prompt[:stop]) for prompt in prompts for stop in range(1, len(prompt))}
    assert computed == len(distinct) + len(prompts)


@given(PROMPTS)
def test_shared_stretches_follow_each_other_and_hold_the_tokens_of_their_prompts(prompts):
    plan = plan_prefixes(prompts, [1] * len(prompts), least_tokens=1)
    for index, stretch in enumerate(plan.shared):
        assert stretch.start < stretch.stop
        if stretch.parent is None:
            assert stretch.start == 0
        else:
            assert stretch.parent < index
            assert plan.shared[stretch.parent].stop == stretch.start
    for prompt, at in enumerate(plan.beginning):
        assert plan.shared_tokens(prompt) < len(prompts[prompt])
        while at is not None:
            stretch = plan.shared[at]
            source = prompts[stretch.source]
            assert source[stretch.start : stretch.stop] == prompts[prompt][stretch.start : stretch.stop]
            at = stretch.parent


def test_short_beginnings_are_not_shared():
    prompts = [[1, 2, 3, 4, 5, 9], [1, 2, 3, 4, 5, 8], [1, 2, 7, 7, 7, 7]]
    plan = plan_prefixes(prompts, [1, 1, 1], least_tokens=3)
    assert [(one.start, one.stop) for one in plan.shared] == [(0, 5)]
    assert [plan.shared_tokens(one) for one in range(3)] == [5, 5, 0]


def test_requests_with_long_answers_and_short_prompts_start_first():
    prompts = [[1] * 50, [2] * 10, [3] * 10]
    assert plan_prefixes(prompts, [5, 5, 50]).order == (2, 1, 0)


def test_requests_of_a_group_start_one_after_another():
    long, short = [7] * 30, [8] * 30
    prompts = [[*long, 1], [*short, 1], [*long, 2], [*short, 2], [*long, 3]]
    order = plan_prefixes(prompts, [4] * 5).order
    assert order in ((0, 2, 4, 1, 3), (1, 3, 0, 2, 4))


def test_a_thousand_prompts_that_begin_with_each_other_need_no_recursion():
    prompts = [[5] * length for length in range(1, 1200)]
    plan = plan_prefixes(prompts, [1] * len(prompts), least_tokens=1)
    assert sum(one.stop - one.start for one in plan.shared) == 1197


def test_common_chunks_come_first_and_everything_else_stays():
    rare, often, question = Segment((1, 1), "rare"), Segment((2, 2), "often"), Segment((3,))
    prompts = [Prompt((Segment((0,)), rare, often, question)), Prompt((Segment((0,)), often, question))]
    ordered = common_chunks_first(prompts)
    assert ordered[0] == Prompt((Segment((0,)), often, rare, question))
    assert ordered[1] == prompts[1]
