from __future__ import annotations

import numpy as np
import pytest

from ragkit.retrieval.fusion import Ranked, reciprocal_rank_fusion, score_fusion


def ranked(rows: list[int], scores: list[float], weight: float = 1.0) -> Ranked:
    return Ranked(np.array(rows, dtype=np.int64), np.array(scores, dtype=np.float32), weight)


def test_reciprocal_ranks_add_up() -> None:
    fused = reciprocal_rank_fusion([ranked([7, 8], [9, 1]), ranked([8, 9], [5, 4])], k=60)
    assert [row for row, _ in fused] == [8, 7, 9]
    assert [score for _, score in fused] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


def test_a_weight_multiplies_its_list() -> None:
    fused = dict(reciprocal_rank_fusion([ranked([1], [1], 0.25), ranked([2], [1], 0.75)], k=0))
    assert fused == {1: 0.25, 2: 0.75}


def test_scores_are_taken_over_the_best_of_their_list() -> None:
    fused = score_fusion([ranked([1, 2], [0.8, 0.6], 0.5), ranked([2, 3], [12, 3], 0.5)])
    assert [row for row, _ in fused] == [2, 1, 3]
    assert [score for _, score in fused] == pytest.approx([0.375 + 0.5, 0.5, 0.125])


def test_scores_below_zero_add_nothing() -> None:
    assert dict(score_fusion([ranked([1, 2], [0.5, -0.5])])) == {1: 1.0, 2: 0.0}
    assert dict(score_fusion([ranked([1], [-1.0])])) == {1: 0.0}


def test_an_empty_list_changes_nothing() -> None:
    only = ranked([3, 1], [2, 1])
    for fuse in (score_fusion, reciprocal_rank_fusion):
        assert fuse([only, ranked([], [])]) == fuse([only])
        assert fuse([]) == []


def test_equal_scores_come_in_order_of_row_id() -> None:
    lists = [ranked([9, 4], [1, 1]), ranked([4, 9], [1, 1])]
    assert [row for row, _ in reciprocal_rank_fusion(lists)] == [4, 9]
    assert [row for row, _ in score_fusion(lists)] == [4, 9]
