from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.errors import RetrievalError
from ragkit.retrieval.windows import overlapping_windows, pool_windows, split_windows, unit_rows


@given(st.lists(st.integers(1, 6), max_size=40), st.integers(1, 20))
def test_windows_tile_the_text_and_fit(word_lengths: list[int], limit: int) -> None:
    words = [number for number, length in enumerate(word_lengths) for _ in range(length)]
    spans = split_windows(words, limit)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(words)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert all(stop - start <= limit for start, stop in spans)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=40), st.integers(4, 20))
def test_words_that_fit_a_window_are_never_cut(word_lengths: list[int], limit: int) -> None:
    words = [number for number, length in enumerate(word_lengths) for _ in range(length)]
    for _, stop in split_windows(words, limit)[:-1]:
        assert words[stop] != words[stop - 1]


def test_windows_are_of_equal_size() -> None:
    assert split_windows(list(range(300)), 254) == [(0, 150), (150, 300)]
    assert split_windows(list(range(509)), 254) == [(0, 170), (170, 340), (340, 509)]


def test_a_word_longer_than_the_window_is_cut_inside() -> None:
    assert split_windows([0] * 25, 10) == [(0, 10), (10, 20), (20, 25)]


def test_pooling_weighs_windows_by_tokens_and_renormalises() -> None:
    vectors = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    pooled = pool_windows(vectors, np.array([3, 4, 7]), np.array([0, 0, 1]), 2)
    assert pooled == pytest.approx(np.array([[0.6, 0.8], [0, 1]]))


def test_a_row_that_is_not_finite_is_named() -> None:
    with pytest.raises(RetrievalError, match="text 1 of 2"):
        unit_rows(np.array([[1, 0], [np.inf, 0]], dtype=np.float32))


@given(st.integers(0, 400), st.integers(1, 60), st.floats(0, 0.5))
def test_overlapping_windows_own_every_token_once_and_share_what_was_asked(
    total: int, limit: int, share: float
) -> None:
    overlap = int(share * limit)
    windows = overlapping_windows(total, limit, overlap)
    owned = [token for window in windows for token in range(window.own_start, window.own_stop)]
    assert owned == list(range(total))
    assert {window.stop - window.start for window in windows} == {min(total, limit)}
    for one, other in itertools.pairwise(windows):
        assert one.stop - other.start >= overlap
        assert one.own_stop >= other.start + overlap // 2
        assert other.own_start <= one.stop - overlap // 2


def test_an_overlap_of_a_whole_window_is_refused() -> None:
    with pytest.raises(RetrievalError, match="windows of 4 tokens cannot overlap by 4"):
        overlapping_windows(9, 4, 4)
