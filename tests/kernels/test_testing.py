import pytest
import torch

from ragkit.kernels.testing import assert_matches, canaried, guarded


def test_an_error_above_the_bound_fails():
    reference = torch.linspace(-1, 1, 100)
    wrong = reference.clone()
    wrong[50] += 1e-3
    with pytest.raises(AssertionError, match="largest error"):
        assert_matches(wrong, reference)


def test_nan_at_a_place_where_the_reference_has_none_fails():
    with pytest.raises(AssertionError, match="finite"):
        assert_matches(torch.tensor([torch.nan]), torch.ones(1))


def test_guarded_views_have_nan_rows_around_them():
    view = guarded(torch.ones(2, 3))
    assert bool(view.as_strided((1, 3), (3, 1), view.storage_offset() + 6).isnan().all())


def test_a_write_outside_the_canaried_view_is_found():
    view, check = canaried((2, 3), torch.float32, torch.device("cpu"))
    check()
    view.as_strided((1,), (1,), view.storage_offset() + 6).fill_(1.0)
    with pytest.raises(AssertionError, match="outside"):
        check()
