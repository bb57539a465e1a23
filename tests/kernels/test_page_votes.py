import math

import pytest
import torch

pytest.importorskip("triton")

from ragkit.kernels import page_votes as module
from ragkit.kernels.launched import LaunchedKernel
from ragkit.kernels.page_votes import add_page_votes
from ragkit.kernels.testing import assert_matches, canaried, guarded

AHEAD, BY_EACH = 0, 1 << 30  # weights up to which each program merges all tiles: none, or any number
TILE = 8  # pages


@pytest.fixture(params=[AHEAD, BY_EACH], ids=["merged ahead", "merged by each"])
def merged(request, monkeypatch):
    monkeypatch.setattr(module, "_MERGED_BY_EACH", request.param)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """The kernels that would be launched: their names and grids."""
    noted = []

    def note(kernel, grid, *arguments, **constants):
        noted.append((kernel.source.fn.__name__, grid))

    monkeypatch.setattr(LaunchedKernel, "_launch", note)
    return noted


def _votes(scores, rows, bounds=None, out=None):
    """What the kernels make of base-2 scores, of which those that do not compete are poisoned."""
    pages = scores.shape[1]
    first, last = (0, pages) if bounds is None else (bounds[0], max(bounds[0], min(bounds[1], pages)))
    competing = torch.full_like(scores, -math.inf)
    competing[:, first:last] = scores[:, first:last]
    tiles = torch.nn.functional.pad(competing, (0, -pages % TILE), value=-math.inf).unflatten(1, (-1, TILE))
    weights = (tiles.double() * math.log(2)).logsumexp(dim=2) / math.log(2)
    poisoned = torch.full_like(scores, math.nan)
    poisoned[:, first:last] = scores[:, first:last]
    add, check = out is not None, None
    if out is None:
        out, check = canaried((rows, pages), torch.float32, scores.device)
    chosen = None if bounds is None else torch.tensor([*bounds, pages], dtype=torch.int32, device=scores.device)
    add_page_votes(guarded(poisoned), guarded(weights.T.float()), out, bounds=chosen, add=add)
    if check is not None:
        check()
    shares = (competing.double() * math.log(2)).softmax(dim=1).unflatten(0, (rows, -1)).sum(dim=1)
    shares[:, :first], shares[:, last:] = -math.inf, -math.inf
    return out, shares.float()


def _scores(voters, pages, device, rng):
    return torch.randn(voters, pages, device=device, generator=rng) * 3


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("voters", "pages"), [(3, 5), (3, 8), (21, 9), (51, 33), (57, 40), (150, 70)])
def test_votes_are_the_softmax_of_all_voters_of_a_row(merged, voters, pages, rows, device, rng):
    got, expected = _votes(_scores(voters, pages, device, rng), rows)
    assert_matches(got, expected)
    assert got.sum(dim=1).tolist() == pytest.approx([voters / rows] * rows, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bounds", [(42, 44), (8, 16), (0, 3), (69, 90), (31, 65)])
def test_tiles_in_which_no_page_competes_have_no_part(merged, bounds, rows, device, rng):
    got, expected = _votes(_scores(21, 70, device, rng), rows, bounds)
    assert_matches(got, expected)
    assert int(got.isfinite().sum()) == rows * (min(bounds[1], 70) - bounds[0])


@pytest.mark.parametrize("bounds", [(0, 0), (40, 40), (50, 20)])
def test_where_no_page_competes_none_has_votes(merged, bounds, device, rng):
    got, _ = _votes(_scores(9, 70, device, rng), 1, bounds)
    assert got.tolist() == [[-math.inf] * 70]


@pytest.mark.parametrize("rows", [1, 3])
def test_votes_are_added_to_those_of_earlier_voters(merged, rows, device, rng):
    bounds = (10, 50)
    earlier, first = _votes(_scores(60, 70, device, rng), rows, bounds)
    got, second = _votes(_scores(9, 70, device, rng), rows, bounds, out=earlier)
    assert_matches(got, first + second)


def test_scores_far_apart_neither_overflow_nor_vanish(merged, device, rng):
    scores = _scores(20, 70, device, rng) * 1000
    got, expected = _votes(scores, 1)
    assert_matches(got, expected)
    assert float(got.sum()) == pytest.approx(20, rel=1e-5)


def test_two_runs_give_the_same_bits(merged, device, rng):
    scores = _scores(51, 70, device, rng)
    assert torch.equal(_votes(scores, 3)[0], _votes(scores, 3)[0])


def _shapes(voters, tiles, device):
    """Scores, weights and votes of which nothing is looked at."""
    pages = 64 * tiles
    return [torch.empty(size, device=device) for size in ((voters, pages), (tiles, voters), (1, pages))]


@pytest.mark.parametrize(
    ("voters", "tiles", "expected"),
    [
        (32, 256, ["_page_votes_kernel"]),
        (33, 256, ["_merge_tiles_kernel", "_page_votes_kernel"]),
        (256, 32, ["_page_votes_kernel"]),
        (256, 256, ["_merge_tiles_kernel", "_page_votes_kernel"]),
        (9000, 1, ["_page_votes_kernel"]),
    ],
)
def test_tiles_are_merged_ahead_where_programs_would_read_many_again(voters, tiles, expected, launches, device):
    add_page_votes(*_shapes(voters, tiles, device))
    assert [name for name, _ in launches] == expected


def test_tiles_of_all_voters_are_merged_once(launches, device):
    add_page_votes(*_shapes(257, 40, device))
    assert launches[0] == ("_merge_tiles_kernel", (33,))


@pytest.mark.parametrize("voters", [1, 4, 32, 256, 4096])
@pytest.mark.parametrize("tiles", [1, 2, 16, 17, 64, 256, 2048])
def test_a_gpus_program_holds_no_more_than_fits_its_registers(voters, tiles):
    tile = module._votes_tile(voters, tiles)
    assert tile.voters * tile.tiles <= 8192
    assert tile.voters * tile.pages <= 4096
    assert tile.voters * max(tile.pages, tile.tiles) <= tile.warps * 32 * 32
    assert (tile.tiles == 1) == (tiles == 1)
    assert tile.voters >= min(voters, 32)


def test_a_step_of_decoding_has_all_its_weights_under_way_at_once():
    assert module._votes_tile(32, 256) == (64, 32, 256, 8)
    assert module._votes_tile(256, 1) == (32, 64, 1, 8)
