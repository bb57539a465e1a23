import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.propagation_plan import TILE_ROWS, plan_propagation


def _plan(selected, cu_rows, cu_selected, sigma=2.0):
    return plan_propagation(torch.tensor(selected), torch.tensor(cu_rows), torch.tensor(cu_selected), sigma)


def test_tiles_cover_every_row_once_and_stay_within_a_chunk():
    chunks = [0, 5, 5, 5 + TILE_ROWS, 6 + 3 * TILE_ROWS]
    tiles = _plan([], chunks, [0] * 5).tiles.tolist()
    covered = [row for first, end, _, _ in tiles for row in range(first, end)]
    assert covered == list(range(chunks[-1]))
    assert [first for first, *_ in tiles] == [0, 5, 69, 133, 197]


def test_a_tile_names_the_recomputed_rows_of_its_chunk_within_reach():
    selected = [0, 70, 120, 127, 128, 136, 199, 201]
    plan = _plan(selected, [0, 200, 202], [0, 7, 8])
    assert plan.reach == 8
    assert plan.tiles.tolist() == [[0, 64, 0, 2], [64, 128, 1, 5], [128, 192, 2, 7], [192, 200, 6, 7], [200, 202, 7, 8]]


def test_a_tile_that_no_recomputed_row_is_near_to_has_an_empty_range():
    assert _plan([150], [0, 200], [0, 1]).tiles[:, 2:].tolist() == [[0, 0], [0, 0], [0, 1], [1, 1]]


def test_every_row_knows_its_entry():
    assert _plan([1, 3], [0, 2, 5], [0, 1, 2]).entry_of_row.tolist() == [-1, 0, -1, 1, -1]


def test_a_recomputed_row_stands_for_the_rows_that_it_is_nearest_to():
    # Chunks of 10, 1, 0 and 20 rows; halves of a row where two are equally near.
    plan = _plan([2, 3, 8, 10, 11, 30], [0, 10, 11, 11, 31], [0, 3, 4, 4, 6])
    assert plan.stands_for.tolist() == [3.0, 3.0, 4.0, 1.0, 10.0, 10.0]
    assert _plan([50], [0, 100], [0, 1], sigma=4.0).stands_for.tolist() == [32.0]  # no further than it reaches


def test_weights_sum_to_at_most_one_and_end_at_four_sigmas():
    plan = _plan([20, 21, 22, 23, 24, 25], [0, 60], [0, 6], sigma=3.0)
    sums = plan.blocks[0].weights.sum(1)
    assert sums[:8].tolist() == [0.0] * 8
    assert float(sums[8]) > 0
    assert sums[20:26].tolist() == pytest.approx([1.0] * 6)
    assert bool((sums < 1 + 1e-6).all())


@pytest.mark.parametrize(
    ("selected", "cu_rows", "cu_selected", "sigma", "message"),
    [
        ([1, 1], [0, 5], [0, 2], 1.0, "ascending rows from 0 to 4"),
        ([-1], [0, 5], [0, 1], 1.0, "ascending rows from 0 to 4"),
        ([5], [0, 5], [0, 1], 1.0, "ascending rows from 0 to 4"),
        ([1], [1, 5], [0, 1], 1.0, "rise from 0"),
        ([1], [0, 5, 4], [0, 1, 1], 1.0, "rise from 0"),
        ([1, 3], [0, 2, 5], [0, 2, 2], 1.0, "count the selected rows of each chunk"),
        ([1], [0, 5], [0, 1, 1], 1.0, r"got \(1,\), \(2,\), \(3,\)"),
        ([1], [0, 5], [0, 1], float("nan"), "at least 0.25"),
        ([1], [0, 5], [0, 1], 0.0, "at least 0.25"),
    ],
)
def test_indices_that_contradict_each_other_are_refused(selected, cu_rows, cu_selected, sigma, message):
    with pytest.raises(KernelInputError, match=message):
        _plan(selected, cu_rows, cu_selected, sigma)
