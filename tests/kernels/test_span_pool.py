import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.span_pool import span_pool, span_pool_torch
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RAGGED = [(0, 1), (1, 17), (17, 17), (10, 40), (40, 63), (0, 63), (62, 63)]


def _spans(pairs, device):
    starts, stops = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
    return starts.contiguous(), stops.contiguous()


def _compare(states, starts, stops, normalise=True):
    got = span_pool(states, starts, stops, normalise=normalise, backend=Backend.TRITON)
    assert got.dtype == torch.float32
    assert_matches(got, span_pool_torch(states.float(), starts, stops, normalise=normalise))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 32, 80, 384])
def test_matches_the_definition_on_ragged_and_overlapping_spans(dim, dtype, normalise, device, rng):
    states = guarded(torch.randn(63, dim, device=device, generator=rng).to(dtype))
    _compare(states, *_spans(RAGGED, device), normalise)


@pytest.mark.parametrize("dim", [768, 1024, 2560])
def test_matches_the_definition_for_wide_states(dim, device, rng):
    states = guarded(torch.randn(40, dim, device=device, generator=rng).to(torch.bfloat16))
    _compare(states, *_spans([(0, 33), (33, 40)], device))


def test_rows_at_any_stride_are_read_in_place(device, rng):
    outer = torch.full((20, 96), math.nan, device=device)
    outer[:, 32:64] = torch.randn(20, 32, device=device, generator=rng)
    _compare(outer[:, 32:64], *_spans([(0, 7), (7, 20)], device))


@pytest.mark.parametrize("backend", list(Backend))
def test_a_mean_is_what_it_says(backend, device):
    states = torch.tensor([[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]], device=device)
    starts, stops = _spans([(0, 2), (2, 3), (1, 1)], device)
    means = span_pool(states, starts, stops, normalise=False, backend=backend)
    assert means.tolist() == [[1.5, 2.0], [9.0, 9.0], [0.0, 0.0]]
    unit = span_pool(states, starts, stops, backend=backend)
    assert unit[0].tolist() == pytest.approx([0.6, 0.8])
    assert unit.norm(dim=1).tolist() == pytest.approx([1.0, 1.0, 0.0])


@pytest.mark.parametrize("backend", list(Backend))
def test_long_spans_of_half_precision_are_summed_in_fp32(backend, device):
    states = torch.ones(5000, 16, dtype=torch.bfloat16, device=device)  # a bf16 sum of ones stops growing at 256
    mean = span_pool(states, *_spans([(0, 5000)], device), normalise=False, backend=backend)
    assert mean.tolist() == [[1.0] * 16]


@pytest.mark.parametrize("backend", list(Backend))
def test_only_the_span_that_holds_a_nan_is_poisoned(backend, device, rng):
    states = torch.randn(12, 16, device=device, generator=rng)
    states[5, 3] = math.nan
    pooled = span_pool(states, *_spans([(0, 5), (5, 6), (6, 12)], device), backend=backend)
    assert pooled.isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize(("tokens", "dim", "pairs"), [(0, 8, []), (4, 8, []), (0, 8, [(0, 0)])])
def test_nothing_to_pool_gives_nothing(backend, tokens, dim, pairs, device):
    pooled = span_pool(torch.ones(tokens, dim, device=device), *_spans(pairs, device), backend=backend)
    assert pooled.tolist() == [[0.0] * dim] * len(pairs)


def test_inputs_that_do_not_fit_are_refused(device):
    states = torch.ones(4, 8, device=device)
    starts, stops = _spans([(0, 2), (2, 4)], device)
    for inputs, message in (
        ((states[0], starts, stops), r"states must be \(tokens, dim\)"),
        ((states.t(), starts, stops), "with contiguous rows"),
        ((states, starts.int(), stops), r"starts must be \(spans,\) int64"),
        ((states, starts, stops[:1]), r"stops must be \(spans,\) int64, got \(1,\)"),
    ):
        with pytest.raises(KernelInputError, match=message):
            span_pool(*inputs)
    with pytest.raises(KernelInputError, match="at most 8192 channels"):
        span_pool(torch.ones(2, 9000, device=device), starts[:1], stops[:1], backend=Backend.TRITON)
