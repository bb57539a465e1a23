import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.page_top_k import page_top_k, page_top_k_torch
from ragkit.kernels.testing import guarded


def _bounds(*numbers, device):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _compare(scores, k, **options):
    got = page_top_k(scores, k, **options, backend=Backend.TRITON)
    expected = page_top_k_torch(scores, k, **options)
    for mine, reference in zip(got, expected, strict=True):
        assert mine.dtype == torch.int32
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("pages", [1, 2, 31, 64, 65, 1000])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_matches_the_definition(rows, pages, k, device, rng):
    _compare(guarded(torch.randn(rows, pages, device=device, generator=rng), math.inf), k)


@pytest.mark.parametrize("k", [64, 256])
def test_chooses_from_a_million_tokens_of_pages(k, device, rng):
    _compare(torch.randn(2, 16384, device=device, generator=rng) * 1e-3, k)


@pytest.mark.parametrize("pages", [40, 300])
def test_matches_the_definition_where_many_scores_are_equal(pages, device, rng):
    _compare(torch.randint(-2, 3, (4, pages), device=device, generator=rng).float(), 33)


@pytest.mark.parametrize("keep_rest", [False, True])
@pytest.mark.parametrize("with_bounds", [False, True])
@pytest.mark.parametrize("is_listed", [False, True])
def test_matches_the_definition_where_a_page_has_a_part_in_the_score_before_it(
    is_listed, with_bounds, keep_rest, device, rng
):
    scores = torch.randn(3, 70, device=device, generator=rng)
    steps = torch.randint(1, 3, scores.shape, device=device, generator=rng)
    bounds = _bounds(3, 60, 66, device=device) if with_bounds else None
    listed = steps.cumsum(1).int() if is_listed else None
    _compare(scores, 20, bounds=bounds, keep_rest=keep_rest and with_bounds, follow=0.5, listed=listed)


@pytest.mark.parametrize("backend", list(Backend))
def test_the_page_behind_a_high_score_is_chosen_and_the_one_behind_a_gap_or_a_sink_is_not(backend, device):
    scores = torch.tensor([[9.0, 0.1, 0.2, 4.0, 0.1, 0.3, 0.3]], device=device)
    bounds = _bounds(1, 7, 7, device=device)
    pages, _ = page_top_k(scores, 2, bounds=bounds, follow=0.5, backend=backend)
    assert pages.tolist() == [[3, 4]]
    listed = _bounds(0, 1, 2, 3, 8, 9, 12, device=device).unsqueeze(0)
    pages, _ = page_top_k(scores, 2, bounds=bounds, follow=0.5, listed=listed, backend=backend)
    assert pages.tolist() == [[3, 5]]


@pytest.mark.parametrize("k", [1, 5, 9, 20])
def test_scores_of_all_magnitudes_and_both_signs_are_in_order(k, device):
    spread = [0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1.0, -1.0, 3.4e38, -3.4e38, 1.0000001, 2.0, -2.0]
    scores = torch.tensor([spread, list(reversed(spread))], device=device)
    got, _ = page_top_k(scores, k, backend=Backend.TRITON)
    best = scores[0].sort(descending=True).values[:k]
    for row in range(2):
        assert torch.equal(scores[row][got[row, : len(best)].long()].sort(descending=True).values, best)


@pytest.mark.parametrize("backend", list(Backend))
def test_equal_scores_go_to_the_lower_pages_and_pages_are_ascending(backend, device):
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 3.0, 2.0], [0.0, -0.0, 0.0, -1.0, 0.0, -0.0]], device=device)
    pages, counts = page_top_k(scores, 3, backend=backend)
    assert pages.tolist() == [[1, 2, 4], [0, 1, 2]]
    assert counts.tolist() == [3, 3]


@pytest.mark.parametrize("backend", list(Backend))
def test_pages_without_a_score_are_never_chosen_and_the_rest_is_zeros(backend, device):
    scores = torch.tensor([[-math.inf, 2.0, math.nan, -5.0], [math.nan] * 4, [math.inf, 1.0, 1.0, 1.0]], device=device)
    pages, counts = page_top_k(scores, 3, backend=backend)
    assert pages.tolist() == [[1, 3, 0], [0, 0, 0], [0, 1, 2]]
    assert counts.tolist() == [2, 0, 3]


@pytest.mark.parametrize("backend", list(Backend))
def test_fewer_pages_than_asked_for_are_all_chosen(backend, device):
    pages, counts = page_top_k(torch.tensor([[1.0, 2.0]], device=device), 5, backend=backend)
    assert pages.tolist() == [[0, 1, 0, 0, 0]]
    assert counts.tolist() == [2]


@pytest.mark.parametrize("backend", list(Backend))
def test_only_pages_within_the_bounds_compete(backend, device):
    scores = torch.tensor([[9.0, 8.0, 1.0, 3.0, 2.0, 7.0, 6.0]], device=device)
    pages, counts = page_top_k(scores, 2, bounds=_bounds(2, 5, 6, device=device), backend=backend)
    assert pages.tolist() == [[3, 4]]
    assert counts.tolist() == [2]


@pytest.mark.parametrize("backend", list(Backend))
def test_sinks_and_window_are_kept_and_count_towards_k_but_pages_behind_the_end_do_not(backend, device):
    scores = torch.tensor([[-math.inf, 0.0, 1.0, 3.0, 2.0, math.nan, 6.0]], device=device)
    options = {"bounds": _bounds(1, 5, 6, device=device), "keep_rest": True, "backend": backend}
    assert page_top_k(scores, 4, **options)[0].tolist() == [[0, 3, 4, 5]]
    pages, counts = page_top_k(scores, 7, **options)
    assert pages.tolist() == [[0, 1, 2, 3, 4, 5, 0]]
    assert counts.tolist() == [6]


@pytest.mark.parametrize("keep_rest", [False, True])
@pytest.mark.parametrize("bounds", [(0, 0, 0), (3, 90, 100), (0, 100, 100), (100, 100, 100), (10, 200, 300)])
def test_matches_the_definition_within_bounds(bounds, keep_rest, device, rng):
    scores = torch.randn(2, 100, device=device, generator=rng)
    _compare(scores, 17, bounds=_bounds(*bounds, device=device), keep_rest=keep_rest)


@pytest.mark.parametrize("backend", list(Backend))
def test_no_rows_and_no_pages_give_nothing(backend, device):
    pages, counts = page_top_k(torch.empty(0, 5, device=device), 3, backend=backend)
    assert (pages.shape, counts.shape) == ((0, 3), (0,))
    pages, counts = page_top_k(torch.empty(2, 0, device=device), 3, backend=backend)
    assert pages.tolist() == [[0, 0, 0]] * 2
    assert counts.tolist() == [0, 0]


def test_inputs_that_do_not_fit_are_refused(device):
    scores = torch.zeros(2, 6, device=device)
    for wrong, k, options, message in (
        (scores[0], 1, {}, r"scores must be \(rows, pages\) fp32"),
        (scores.half(), 1, {}, r"scores must be \(rows, pages\) fp32"),
        (scores[:, ::2], 1, {}, "contiguous"),
        (scores, 0, {}, "k must be from 1 to 8,192, got 0"),
        (torch.zeros(1, (1 << 16) + 1, device=device), 1, {}, "at most 65,536 pages"),
        (scores, 1, {"bounds": torch.zeros(2, dtype=torch.int32, device=device)}, r"bounds must be \(3,\) int32"),
        (scores, 1, {"bounds": torch.zeros(3, device=device)}, r"bounds must be \(3,\) int32"),
    ):
        with pytest.raises(KernelInputError, match=message):
            page_top_k(wrong, k, **options)
