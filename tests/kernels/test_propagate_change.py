import math
from dataclasses import dataclass, field

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.propagate_change import propagate_change, propagate_change_torch
from ragkit.kernels.propagation_plan import plan_propagation
from ragkit.kernels.testing import CANARY, assert_matches, canaried, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZE = 16
FIRST_POSITION = 7


@dataclass
class Case:
    """Inputs of one layer, and where its rows go: pools and copies full of canaries."""

    cached: list = field(default_factory=list)
    fresh: list = field(default_factory=list)
    plan: object = None
    slots: object = None
    tables: list = field(default_factory=list)
    pools: list = field(default_factory=list)
    copies: list = field(default_factory=list)
    checks: list = field(default_factory=list)
    strengths: tuple = (0.5, 1.0)
    places: object = None

    def run(self, backend=None, copies=True):
        options = dict(zip(("key_strength", "value_strength"), self.strengths, strict=True))
        if copies:
            options |= {"cos": self.tables[0], "sin": self.tables[1], "first_position": FIRST_POSITION}
            options |= {"rotated_keys": self.copies[0], "plain_values": self.copies[1]}
        options["places"] = self.places
        arguments = (*self.cached, *self.fresh, self.plan, self.slots, *self.pools)
        if backend is None:
            propagate_change_torch(*arguments, **options)
        else:
            propagate_change(*arguments, **options, backend=backend)
        for check in self.checks:
            check()

    def rows(self):
        return [pool.flatten(0, 1)[self.slots] for pool in self.pools]

    def placed(self):
        return [copy[FIRST_POSITION : FIRST_POSITION + self.plan.rows] for copy in self.copies]

    def reference(self, dtype=torch.float32):
        """The same inputs, outputs of their own in `dtype`."""
        return Case(
            [rows.float() for rows in self.cached], [rows.float() for rows in self.fresh], self.plan, self.slots,
            self.tables, [torch.full_like(pool, CANARY, dtype=dtype) for pool in self.pools],
            [torch.full_like(copy, CANARY, dtype=dtype) for copy in self.copies], [], self.strengths,
        )  # fmt: skip


def _plan(chunks, sigma, device):
    """The plan of (length, recomputed rows of the chunk) pairs."""
    starts, selected, entries = [0], [], [0]
    for length, chosen in chunks:
        selected += [starts[-1] + row for row in chosen]
        starts.append(starts[-1] + length)
        entries.append(len(selected))
    return plan_propagation(
        torch.tensor(selected, dtype=torch.int32, device=device), torch.tensor(starts), torch.tensor(entries), sigma
    )


def _case(chunks, device, rng, *, sigma=6.0, heads=2, head_dim=16, dtype=torch.float32):
    plan = _plan(chunks, sigma, device)

    def normal(rows):
        # Behind each other as in a fused projection: the rows of keys and values lie three rows apart.
        wide = guarded(torch.randn(rows, 3 * heads, head_dim, device=device, generator=rng).to(dtype))
        wide[:, 2 * heads :] = math.nan
        return [wide[:, :heads], wide[:, heads : 2 * heads]]

    case = Case(normal(plan.rows), normal(len(plan.selected)), plan)
    blocks = -(-plan.rows // BLOCK_SIZE) + 2
    case.slots = guarded(torch.randperm(blocks * BLOCK_SIZE, device=device, generator=rng)[: plan.rows], 10**9)
    end = FIRST_POSITION + plan.rows
    angles = torch.rand(end, head_dim // 2, device=device, generator=rng) * 6
    case.tables = [guarded(angles.cos()), guarded(angles.sin())]
    for outputs, shape in ((case.pools, (blocks, BLOCK_SIZE)), (case.copies, (end,))):
        for _ in range(2):
            view, check = canaried((*shape, heads, head_dim), dtype, device)
            view.fill_(CANARY)
            outputs.append(view)
            case.checks.append(check)
    return case


def _compare(case):
    case.run(Backend.TRITON)
    expected = case.reference()
    expected.run()
    for got, reference in zip(case.rows() + case.placed(), expected.rows() + expected.placed(), strict=True):
        assert_matches(got, reference, reduced=2)


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


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(chunks, dtype, device, rng):
    _compare(_case(chunks, device, rng, dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 3])
def test_matches_the_definition_for_every_head_size(head_dim, heads, device, rng):
    _compare(_case([_spread(70, 9), (3, [])], device, rng, heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("sigma", [0.25, 0.3, 1.0, 48.0, 1000.0])
def test_matches_the_definition_for_every_width_of_smoothing(sigma, device, rng):
    _compare(_case([_spread(150, 7), (90, [3])], device, rng, sigma=sigma))


def test_the_definition_is_the_formula(device, rng):
    case = _case([(40, [2, 3, 30]), (300, [10, 280]), (9, [])], device, rng, sigma=5.0)
    case.run()
    chunk_of = [0] * 40 + [1] * 300 + [2] * 9
    selected = case.plan.selected.tolist()
    # Half of the gap to the neighbour on each side, or all of it to the chunk's end.
    stands_for = [2.5 + 0.5, 0.5 + 13.5, 13.5 + 9.5, 10.5 + 135, 40.0]  # the last two up to twice the reach
    for rows, cached, fresh, strength in zip(case.rows(), case.cached, case.fresh, case.strengths, strict=True):
        for row, chunk in enumerate(chunk_of):
            expected = cached[row].double()
            near = {
                entry: math.exp(-((row - other) ** 2) / 50)
                for entry, other in enumerate(selected)
                if chunk_of[other] == chunk and abs(row - other) <= 20
            }
            if row in selected:
                expected = fresh[selected.index(row)]
            elif near:
                weights = {j: weight * min(stands_for[j], 40.0) for j, weight in near.items()}
                change = sum(weight * (fresh[j] - cached[selected[j]]).double() for j, weight in weights.items())
                expected = expected + strength * min(1, sum(near.values())) * change / sum(weights.values())
            assert float((rows[row] - expected).abs().max()) < 2e-6


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_rows_come_out_exactly(backend, dtype, device, rng):
    case = _case([(80, [0, 40, 79]), (20, [5])], device, rng, dtype=dtype)
    case.run(backend)
    for rows, fresh in zip(case.rows(), case.fresh, strict=True):
        assert torch.equal(rows[case.plan.selected], fresh)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_without_recomputed_rows_and_rows_out_of_reach_keep_their_numbers_exactly(backend, dtype, device, rng):
    case = _case([(30, []), (100, [0, 1]), (10, [])], device, rng, sigma=2.0, dtype=dtype)
    case.run(backend)
    kept = [*range(30), *range(30 + 2 + 8, 140)]
    for rows, cached in zip(case.rows(), case.cached, strict=True):
        assert torch.equal(rows[kept], cached[kept])
        assert not bool((rows[32:40] == cached[32:40]).all(-1).all(-1).any())


@pytest.mark.parametrize("backend", list(Backend))
def test_no_strength_moves_nothing(backend, device, rng):
    case = _case([(70, [0, 40])], device, rng)
    case.strengths = (0.0, torch.zeros(2, device=device))
    case.run(backend)
    moved = [row for row in range(70) if row not in (0, 40)]
    for rows, cached in zip(case.rows(), case.cached, strict=True):
        assert torch.equal(rows[moved], cached[moved])


@pytest.mark.parametrize("backend", list(Backend))
def test_every_head_can_have_its_own_strength(backend, device, rng):
    case = _case([(70, [0, 20, 50])], device, rng)
    case.strengths = (torch.tensor([0.0, 0.7], device=device), torch.tensor([1.0, 0.3], device=device))
    case.run(backend)
    for head in (0, 1):
        alone = case.reference()
        alone.strengths = tuple(float(strength[head]) for strength in case.strengths)
        alone.run()
        for got, expected in zip(case.rows(), alone.rows(), strict=True):
            assert_matches(got[:, head], expected[:, head])


@pytest.mark.parametrize("backend", list(Backend))
def test_rows_go_to_their_slots_and_nowhere_else(backend, device, rng):
    case = _case([(50, [4, 33])], device, rng)
    case.run(backend, copies=False)
    for pool in case.pools:
        untouched = torch.ones(pool.shape[0] * BLOCK_SIZE, dtype=torch.bool, device=device)
        untouched[case.slots] = False
        assert bool((pool.flatten(0, 1)[untouched] == CANARY).all())
        assert not bool((pool.flatten(0, 1)[case.slots] == CANARY).any())
    assert all(bool((copy == CANARY).all()) for copy in case.copies)


@pytest.mark.parametrize("backend", list(Backend))
def test_cached_rows_are_read_where_they_lie(backend, device, rng):
    case = _case([(70, [0, 40]), (9, []), (66, [1, 2, 65])], device, rng)
    together = case.reference()
    together.run()
    case.places = guarded(torch.randperm(300, device=device, generator=rng)[: case.plan.rows], 10**9)
    for index, rows in enumerate(case.cached):
        case.cached[index] = guarded(torch.full((300, 2, 16), math.nan, device=device))
        case.cached[index][case.places] = rows
    case.run(backend)
    for got, expected in zip(case.rows() + case.placed(), together.rows() + together.placed(), strict=True):
        assert_matches(got, expected)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_copies_are_the_pooled_rows_with_keys_turned_to_their_positions(backend, dtype, device, rng):
    case = _case([(50, [4, 33])], device, rng, dtype=dtype)
    case.run(backend)
    keys, values = case.rows()
    cos, sin = (table[FIRST_POSITION:, None, :] for table in case.tables)
    first, second = keys.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    assert_matches(case.placed()[0], turned)
    assert torch.equal(case.placed()[1], values)
    assert all(bool((copy[:FIRST_POSITION] == CANARY).all()) for copy in case.copies)


@pytest.mark.parametrize("backend", list(Backend))
def test_a_chunk_moves_alone_as_among_others(backend, device, rng):
    case = _case([(40, [1, 39]), (70, [0, 30, 69]), (20, [0])], device, rng, sigma=30.0)
    case.run(backend)
    alone = _case([(70, [0, 30, 69])], device, rng, sigma=30.0)
    alone.cached = [rows[40:110] for rows in case.cached]
    alone.fresh = [rows[2:5] for rows in case.fresh]
    alone.run(backend)
    for got, expected in zip(alone.rows(), case.rows(), strict=True):
        assert_matches(got, expected[40:110])


def test_recomputing_every_row_gives_the_fresh_rows(device, rng):
    case = _case([(20, list(range(20))), (70, list(range(70)))], device, rng)
    case.run(Backend.TRITON)
    for rows, fresh in zip(case.rows(), case.fresh, strict=True):
        assert torch.equal(rows, fresh)


def test_an_equal_change_of_dense_rows_moves_the_others_as_far(device, rng):
    case = _case([_spread(200, 4)], device, rng, sigma=20.0)
    case.strengths = (1.0, 1.0)
    case.fresh = [rows[case.plan.selected] + 3.0 for rows in case.cached]
    case.run(Backend.TRITON)
    for rows, cached in zip(case.rows(), case.cached, strict=True):
        assert float((rows - cached - 3.0).abs().max()) < 1e-5


def test_shapes_that_do_not_fit_are_refused(device, rng):
    case = _case([(20, [3])], device, rng)
    for name, wrong, message in (
        ("cached", case.cached[0][:19], r"cached_keys must be \(20, 2, 16\)"),
        ("fresh", case.fresh[0][:, :1], r"fresh_keys must be \(1, 2, 16\)"),
        ("cached", case.cached[0].transpose(1, 2).contiguous().transpose(1, 2), "contiguous"),
        ("fresh", case.fresh[0].half(), "must share a type, got torch.float32, torch.float16 of keys"),
        ("pools", case.pools[0][..., :8], "pools must be"),
        ("tables", case.tables[0][:10], r"cos and sin must be \(27 or more, 8\)"),
        ("copies", case.copies[0][:26], r"rotated_keys must be \(27 or more, 2, 16\)"),
        ("copies", case.copies[0].half(), r"contiguous torch.float32, got .* torch.float16"),
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
    case.places = case.slots[:5]
    with pytest.raises(KernelInputError, match=r"places must be \(20,\)"):
        case.run(Backend.TORCH)
    case.places = None
    case.slots = case.slots[:5]
    with pytest.raises(KernelInputError, match=r"slots must be \(20,\)"):
        case.run(Backend.TORCH)
    with pytest.raises(KernelInputError, match="needs plain_values"):
        propagate_change(
            *case.cached, *case.fresh, case.plan, torch.arange(20, device=device), *case.pools,
            key_strength=1.0, value_strength=1.0, rotated_keys=case.copies[0],
        )  # fmt: skip
