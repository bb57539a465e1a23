from __future__ import annotations

import numpy as np
import pytest
from filled_store import unit_vectors

from ragkit.errors import RetrievalError
from ragkit.retrieval.flat import FlatIndex, positions_of, top_positions

VECTORS = unit_vectors(500, 16)
ROW_IDS = np.arange(500, dtype=np.int64) * 2 + 5
PARTS = [VECTORS[:200], VECTORS[200:200], VECTORS[200:]]
QUERIES = unit_vectors(7, 16, seed=1)


def index() -> FlatIndex:
    return FlatIndex(ROW_IDS, PARTS)


def test_hits_are_the_largest_inner_products_over_all_parts() -> None:
    scores, row_ids = index().search(QUERIES, 10)
    products = QUERIES @ VECTORS.T
    expected = np.argsort(-products, axis=1)[:, :10]
    assert np.array_equal(row_ids, ROW_IDS[expected])
    assert np.allclose(scores, np.take_along_axis(products, expected, axis=1), atol=1e-6)


def test_one_question_finds_what_it_finds_among_many() -> None:
    many = index().search(QUERIES, 5)[1]
    assert np.array_equal(np.concatenate([index().search(query[None], 5)[1] for query in QUERIES]), many)


@pytest.mark.parametrize("size", [1, 30, 400])  # below and above the share at which allowed rows are gathered
def test_only_allowed_rows_are_found_and_they_are_the_best_allowed_ones(size: int) -> None:
    allowed = np.sort(np.random.default_rng(2).choice(ROW_IDS, size, replace=False))
    scores, row_ids = index().search(QUERIES, 10, allowed)
    expected = FlatIndex(allowed, [VECTORS[np.isin(ROW_IDS, allowed)]]).search(QUERIES, 10)
    assert row_ids.shape == (7, min(10, size))
    assert np.array_equal(row_ids, expected[1])
    assert np.allclose(scores, expected[0], atol=1e-6)


def test_allowed_rows_that_do_not_exist_are_left_out() -> None:
    row_ids = index().search(QUERIES[:1], 10, np.array([4, 5, 6, 7, 10**9]))[1]
    assert sorted(row_ids[0]) == [5, 7]


def test_equal_scores_come_in_order_of_row_id_also_at_the_border() -> None:
    same = FlatIndex(ROW_IDS[:50], [np.repeat(VECTORS[:1], 50, axis=0)])
    assert same.search(VECTORS[:1], 7)[1][0].tolist() == ROW_IDS[:7].tolist()


def test_more_hits_than_rows_gives_every_row_and_no_rows_give_none() -> None:
    assert index().search(QUERIES, 1000)[1].shape == (7, 500)
    assert FlatIndex(ROW_IDS[:0], []).search(QUERIES, 3)[1].shape == (7, 0)


def test_similarities_are_exact_in_any_order_of_rows() -> None:
    wanted = ROW_IDS[[450, 3, 250]]
    assert np.allclose(index().similarities(QUERIES[:1], wanted), VECTORS[[450, 3, 250]] @ QUERIES[0], atol=1e-6)


def test_take_copies_rows_across_parts() -> None:
    places = np.array([0, 199, 200, 499])
    assert np.array_equal(index().take(places), VECTORS[places])


def test_vectors_and_rows_must_fit() -> None:
    with pytest.raises(RetrievalError, match="500 vectors for 499 rows"):
        FlatIndex(ROW_IDS[:-1], PARTS)


def test_helpers_at_their_edges() -> None:
    assert top_positions(np.array([1, 3, 3, 2], dtype=np.float32), 2).tolist() == [1, 2]
    assert top_positions(np.array([1.0], dtype=np.float32), 0).tolist() == []
    assert positions_of(np.array([2, 4, 6]), np.array([1, 4, 5, 6, 9])).tolist() == [1, 2]
