import math
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.change_field import ChunkCells, FieldPlan, change_field, change_field_torch
from ragkit.kernels.paged_rows import FIELD_ROWS
from ragkit.kernels.propagate_change import propagate_change_torch
from ragkit.kernels.propagation_plan import plan_propagation
from ragkit.kernels.testing import CANARY, assert_matches, canaried, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZE = 64


@dataclass
class Case:
    """Inputs of one layer, and fields full of canaries."""

    chunks: list
    cached: list = field(default_factory=list)
    fresh: list = field(default_factory=list)
    plan: object = None
    fields: list = field(default_factory=list)
    checks: list = field(default_factory=list)
    strengths: tuple = (0.5, 1.0)
    places: object = None

    def run(self, backend=None):
        options = dict(zip(("key_strength", "value_strength"), self.strengths, strict=True)) | {"places": self.places}
        arguments = (*self.cached, *self.fresh, self.plan, *self.fields)
        if backend is None:
            change_field_torch(*arguments, **options)
        else:
            change_field(*arguments, **options, backend=backend)
        for check in self.checks:
            check()

    def reference(self):
        """The same inputs in fp32, and outputs of their own."""
        fields = [torch.full_like(one, CANARY, dtype=torch.float32) for one in self.fields]
        cached, fresh = ([rows.float() for rows in part] for part in (self.cached, self.fresh))
        return Case(self.chunks, cached, fresh, self.plan, fields, [], self.strengths, self.places)

    def cells(self):
        """(cell, rows of its chunk) of every cell that holds rows: rows counted over all chunks."""
        block_size = self.fields[0].shape[1] * FIELD_ROWS
        found, row, block = [], 0, 0
        for length, _ in self.chunks:
            for first in range(0, length, FIELD_ROWS):
                rows = range(row + first, row + min(first + FIELD_ROWS, length))
                found.append(((block * block_size + first) // FIELD_ROWS, rows))
            row, block = row + length, block + -(-length // block_size)
        return found


def _case(chunks, device, rng, *, sigma=6.0, heads=2, head_dim=16, dtype=torch.float32, block_size=BLOCK_SIZE, spare=2):
    """A case of (length, recomputed rows of the chunk) pairs."""
    starts, selected, entries = [0], [], [0]
    for length, chosen in chunks:
        selected += [starts[-1] + row for row in chosen]
        starts.append(starts[-1] + length)
        entries.append(len(selected))
    rows = torch.tensor(selected, dtype=torch.int32, device=device)
    change = plan_propagation(rows, torch.tensor(starts), torch.tensor(entries), sigma)

    def normal():
        # Behind each other as in a fused projection: the rows of keys and values lie three rows apart.
        wide = guarded(torch.randn(len(selected), 3 * heads, head_dim, device=device, generator=rng).to(dtype))
        wide[:, 2 * heads :] = math.nan
        return [wide[:, :heads], wide[:, heads : 2 * heads]]

    case = Case(chunks, normal(), normal(), FieldPlan(change, ChunkCells(starts, block_size, device)))
    blocks = sum(-(-length // block_size) for length, _ in chunks) + spare
    for _ in range(2):
        view, check = canaried((blocks, block_size // FIELD_ROWS, heads, head_dim), dtype, device)
        view.fill_(CANARY)
        case.fields.append(view)
        case.checks.append(check)
    return case


def _spread(length, step):
    return (length, list(range(step // 2, length, step)))


CHUNKS = (
    [],
    [(0, [])],
    [(1, [])],
    [(1, [0])],
    [(15, [3]), (16, []), (17, [0, 16])],
    [(63, [62]), (0, []), (64, list(range(64))), (65, [0, 1, 2, 64])],
    [_spread(200, 5), _spread(130, 2)],
)


def _compare(case):
    case.run(Backend.TRITON)
    expected = case.reference()
    expected.run()
    for got, reference in zip(case.fields, expected.fields, strict=True):
        assert_matches(got, reference, reduced=2)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(chunks, dtype, device, rng):
    _compare(_case(chunks, device, rng, dtype=dtype))


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("strengths", [(0.5, 1.0), "by head", "values by head"])
def test_cached_rows_are_found_where_they_lie(chunks, strengths, device, rng):
    case = _case(chunks, device, rng)
    case.strengths = strengths
    if isinstance(strengths, str):
        by_head = [torch.rand(2, device=device, generator=rng) for _ in range(2)]
        case.strengths = (by_head[0] if strengths == "by head" else 0.5, by_head[1])
    case.run(Backend.TRITON)
    expected = [part.clone() for part in case.fields]
    count = len(case.plan.change.selected)
    case.places = torch.randperm(count + 9, device=device, generator=rng)[:count]
    lying = []
    for cached in case.cached:
        pool = guarded(torch.full((count + 9, 2, 16), math.nan, device=device))
        pool[case.places] = cached
        lying.append(pool)
    case.cached = lying
    for part in case.fields:
        part.fill_(CANARY)
    _compare(case)
    for got, same in zip(case.fields, expected, strict=True):
        assert torch.equal(got, same)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 3])
def test_matches_the_definition_for_every_head_size(head_dim, heads, device, rng):
    _compare(_case([_spread(70, 9), (3, [])], device, rng, heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("sigma", [0.25, 1.0, 48.0, 1000.0])
def test_matches_the_definition_for_every_width_of_smoothing(sigma, device, rng):
    _compare(_case([_spread(150, 7), (90, [3])], device, rng, sigma=sigma))


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_matches_the_definition_for_every_size_of_blocks(block_size, device, rng):
    _compare(_case([_spread(150, 7), (9, [2]), (300, [0, 299])], device, rng, block_size=block_size))


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("backend", list(Backend))
def test_the_field_is_the_mean_of_the_change_that_propagation_gives_each_row_that_stays(
    backend, block_size, device, rng
):
    case = _case(
        [(40, [2, 3, 30]), (0, []), (300, [10, *range(64, 80), 280]), (9, [])],
        device, rng, sigma=5.0, block_size=block_size,
    )  # fmt: skip
    case.run(backend)
    change, rows = case.plan.change, case.plan.change.rows
    chosen = change.selected.tolist()
    pools = [torch.zeros(1, rows, 2, 16, device=device) for _ in range(2)]
    nothing = [torch.zeros(rows, 2, 16, device=device) for _ in range(2)]
    moved = [fresh - cached for fresh, cached in zip(case.fresh, case.cached, strict=True)]
    propagate_change_torch(
        *nothing, *moved, change, torch.arange(rows, device=device), *pools, key_strength=0.5, value_strength=1.0
    )
    for got, pool in zip(case.fields, pools, strict=True):
        for cell, members in case.cells():
            kept = [row for row in members if row not in chosen]
            expected = pool[0, kept].mean(0) if kept else torch.zeros(2, 16, device=device)
            torch.testing.assert_close(got.flatten(0, 1)[cell], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", list(Backend))
def test_cells_out_of_reach_of_chunks_without_and_with_only_recomputed_rows_are_exactly_zero(backend, device, rng):
    case = _case([(30, []), (100, [0, 1]), (16, list(range(16)))], device, rng, sigma=2.0)
    case.run(backend)
    for one in case.fields:
        flat = one.flatten(0, 1)
        assert bool((flat[[0, 1, 5, 6, 7, 8, 9, 10, 12]] == 0).all())
        assert not bool((flat[4] == 0).any())


@pytest.mark.parametrize("backend", list(Backend))
def test_cells_without_rows_and_entries_of_others_are_left_alone(backend, device, rng):
    case = _case([(17, [4]), (64, [33])], device, rng)
    case.run(backend)
    for one in case.fields:
        flat = one.flatten(0, 1)
        assert bool((flat[[2, 3, *range(8, 16)]] == CANARY).all())
        assert not bool((flat[[0, 1, 4, 5, 6, 7]] == CANARY).any())


@pytest.mark.parametrize("backend", list(Backend))
def test_every_head_can_have_its_own_strength(backend, device, rng):
    case = _case([(70, [0, 20, 50])], device, rng)
    case.strengths = (torch.tensor([0.0, 0.7], device=device), torch.tensor([1.0, 0.3], device=device))
    case.run(backend)
    for head in (0, 1):
        alone = case.reference()
        alone.strengths = tuple(float(strength[head]) for strength in case.strengths)
        alone.run()
        for got, expected in zip(case.fields, alone.fields, strict=True):
            assert_matches(got[:1, :, head], expected[:1, :, head])


@pytest.mark.parametrize("backend", list(Backend))
def test_a_chunk_moves_alone_as_among_others(backend, device, rng):
    case = _case([(40, [1, 39]), (70, [0, 30, 69]), (20, [0])], device, rng, sigma=30.0)
    case.run(backend)
    alone = _case([(70, [0, 30, 69])], device, rng, sigma=30.0, spare=0)
    alone.cached, alone.fresh = ([rows[2:5] for rows in part] for part in (case.cached, case.fresh))
    alone.run(backend)
    for got, expected in zip(alone.fields, case.fields, strict=True):
        assert_matches(got.flatten(0, 1)[:5], expected.flatten(0, 1)[4:9])


def test_a_number_type_of_the_field_that_is_not_the_rows_is_taken(device, rng):
    case = _case([(70, [0, 30])], device, rng)
    narrow = [one.to(torch.bfloat16) for one in case.fields]
    case.run(Backend.TRITON)
    wide, case.fields, case.checks = case.fields, narrow, []
    case.run(Backend.TRITON)
    for got, expected in zip(case.fields, wide, strict=True):
        assert_matches(got, expected)


def test_the_cells_of_tiles_follow_the_blocks_of_their_chunks():
    cells = ChunkCells((0, 12, 12, 142, 150), 64, torch.device("cpu"))
    assert cells.of_tiles.tolist() == [0, 4, 8, 12, 16]
    assert cells.num_cells == 20
    assert [cells.at(row) for row in (0, 12, 28, 76, 140, 142)] == [0, 4, 5, 8, 12, 16]
    lengths = [5, 64, 65]
    small = ChunkCells((0, *accumulate(lengths)), 16, torch.device("cpu"))
    assert small.of_tiles.tolist() == [0, 1, 5, 9]
    assert small.num_cells == 1 + 4 + 5


def test_shapes_that_do_not_fit_are_refused(device, rng):
    case = _case([(20, [3])], device, rng)
    for name, wrong, message in (
        ("cached", case.cached[0][:0], r"cached_keys must be \(1, 2, 16\)"),
        ("fresh", case.fresh[0][:, :1], r"fresh_keys must be \(1, 2, 16\)"),
        ("cached", case.cached[0].transpose(1, 2).contiguous().transpose(1, 2), "contiguous"),
        ("fresh", case.fresh[0].half(), "must share a type, got torch.float32, torch.float16 of keys"),
        ("fields", case.fields[0][..., :8], "a field must be"),
        ("fields", case.fields[0][:0], "with 4 cells or more"),
    ):
        kept = getattr(case, name)
        setattr(case, name, [wrong, kept[1]])
        with pytest.raises(KernelInputError, match=message):
            case.run(Backend.TORCH)
        setattr(case, name, kept)
    case.strengths = (1.0, torch.ones(3, device=device))
    with pytest.raises(KernelInputError, match=r"strength must be a number or \(2,\) fp32"):
        case.run(Backend.TORCH)
    case.strengths = (1.0, 1.0)
    case.places = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(KernelInputError, match=r"places must be \(1,\), got \(2,\)"):
        case.run(Backend.TORCH)
    case.places = None
    case.plan = FieldPlan(case.plan.change, ChunkCells((0, 19), BLOCK_SIZE, device))
    with pytest.raises(KernelInputError, match="other chunks than the plan's"):
        case.run(Backend.TORCH)
    with pytest.raises(KernelInputError, match="a multiple of 16 rows, got 24"):
        ChunkCells((0, 20), 24, device)
