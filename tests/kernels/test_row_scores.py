import pytest
import torch

from ragkit.kernels.row_scores import (
    LEAST_SCORE,
    MOST_SCORE,
    ROWS_MULTIPLE,
    SHIFT,
    padded_rows,
    row_exponentials,
    row_scores,
)
from ragkit.kernels.testing import assert_matches


@pytest.mark.parametrize("with_onednn", [True, False])
@pytest.mark.parametrize(("left", "right", "size"), [(1, 1, 16), (3, 65, 64), (192, 4186, 64), (7, 64, 80)])
def test_scores_are_the_products_of_rows(left, right, size, with_onednn, device, rng, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: with_onednn)
    rows, others = (torch.randn(count, size, device=device, generator=rng) for count in (left, right))
    scores = row_scores(rows, others)
    assert scores.dtype == torch.float32
    assert_matches(scores, rows.double() @ others.double().T, reduced=4)


def test_the_first_rows_of_a_longer_tensor_are_multiplied_alone(device, rng):
    rows, others = (torch.randn(count, 64, device=device, generator=rng) for count in (5, 300))
    others[130:] = torch.nan
    assert_matches(row_scores(rows, others[:130]), rows.double() @ others[:130].double().T, reduced=4)


def test_no_rows_have_no_scores(device):
    assert row_scores(torch.empty(0, 64, device=device), torch.ones(9, 64, device=device)).shape == (0, 9)


@pytest.mark.parametrize("with_onednn", [True, False])
def test_exponentials_are_exact_to_their_rounding_in_their_range(with_onednn, device, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: with_onednn)
    scores = torch.linspace(LEAST_SCORE, MOST_SCORE, 1024, device=device)
    right = torch.zeros(1024, 64, device=device, dtype=torch.bfloat16)
    right[:, 0] = scores  # in two parts: bf16 alone would step by 0.25
    right[:, 1] = scores - right[:, 0].float()
    left = torch.zeros(3, 64, device=device, dtype=torch.bfloat16)
    left[:, :2] = 1
    found = row_exponentials(left, right)
    expected = (right[:, :2].double().sum(dim=1) - SHIFT).exp()
    assert found.dtype == torch.bfloat16
    assert float((found.double() / expected - 1).abs().max()) <= 2**-8 + 0.002


@pytest.mark.parametrize(("rows", "padded"), [(0, 0), (1, 1), (ROWS_MULTIPLE, 1), (ROWS_MULTIPLE + 1, 2)])
def test_rows_are_rounded_up_to_whole_multiples(rows, padded):
    assert padded_rows(rows) == padded * ROWS_MULTIPLE
