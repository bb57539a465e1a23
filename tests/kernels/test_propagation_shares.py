import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.propagation_plan import TILE_ROWS, plan_propagation
from ragkit.kernels.propagation_shares import propagation_shares
from ragkit.kernels.testing import assert_matches, guarded

CHUNKS = (
    [(0, [])],
    [(1, [0])],
    [(15, [3]), (16, []), (17, [0, 16])],
    [(63, [62]), (0, []), (64, list(range(64))), (65, [0, 1, 2, 64])],
    [(300, list(range(0, 300, 4))), (130, [0, 129])],
)


def _plan(chunks, sigma, device):
    starts, selected, entries = [0], [], [0]
    for length, chosen in chunks:
        selected += [starts[-1] + row for row in chosen]
        starts.append(starts[-1] + length)
        entries.append(len(selected))
    rows = torch.tensor(selected, dtype=torch.int64, device=device)
    return plan_propagation(rows, torch.tensor(starts), torch.tensor(entries), sigma)


def _shares(plan, backend):
    return propagation_shares(
        guarded(plan.selected, 10**9), guarded(plan.stands_for), plan.tiles,
        rows=plan.rows, tile_rows=TILE_ROWS, sigma=plan.sigma, reach=plan.reach, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("sigma", [0.25, 6.0, 1000.0])
def test_matches_the_definition(chunks, sigma, device):
    plan = _plan(chunks, sigma, device)
    assert_matches(_shares(plan, Backend.TRITON), _shares(plan, Backend.TORCH))


@pytest.mark.parametrize("backend", list(Backend))
def test_a_share_is_what_the_weights_are_divided_by(backend, device):
    plan = _plan([(40, [2, 30]), (9, [])], 5.0, device)
    shares = _shares(plan, backend).tolist()
    for row in range(49):
        near = {j: math.exp(-((row - j) ** 2) / 50) for j in (2, 30) if row < 40 and abs(row - j) <= 20}
        voices = {2: 2.5 + 14, 30: 14 + 9.5}  # rows up to the middle of the gap, or to the chunk's end
        total = sum(weight * voices[j] for j, weight in near.items())
        expected = 0.0 if row in (2, 30) or not near else min(1.0, sum(near.values())) / total
        assert shares[row] == pytest.approx(expected, rel=1e-5)


def test_the_plan_has_them(device):
    plan = _plan([(40, [2, 30])], 5.0, device)
    assert_matches(plan.shares, _shares(plan, Backend.TORCH))
    assert_matches(plan.voices.exp2(), plan.stands_for)


def test_shapes_that_do_not_fit_are_refused(device):
    plan = _plan([(40, [2, 30])], 5.0, device)
    with pytest.raises(KernelInputError, match=r"must be \(n,\)"):
        propagation_shares(
            plan.selected, plan.stands_for[:1], plan.tiles, rows=40, tile_rows=TILE_ROWS, sigma=5.0, reach=20
        )
