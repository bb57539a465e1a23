import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragkit.config import BlendConfig
from ragkit.errors import ConfigError
from ragkit.kvcache.coverage import Coverage, configured_ratio, count_of, most_of

MASSES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40)
SHARES = st.floats(0, 1)


def _needed(mass, first, share):
    """By its definition: tokens are taken one after the other until enough is covered."""
    order = [*first, *sorted(set(range(len(mass))) - set(first), key=lambda index: -mass[index])]
    sums = [0.0]
    for index in order:
        sums.append(sums[-1] + mass[index])
    return next(count for count, covered in enumerate(sums) if covered >= share * sums[-1])


@given(MASSES, SHARES, st.data())
def test_the_share_is_covered_by_the_least_number_of_tokens_in_their_order(mass, share, data):
    first = sorted(data.draw(st.sets(st.integers(0, len(mass) - 1))))
    got = Coverage(share, 0.0, 1.0).tokens(torch.tensor(mass), torch.tensor(first, dtype=torch.int64), len(mass))
    assert got == _needed(mass, first, share)


@given(MASSES, SHARES, SHARES, SHARES, SHARES, st.integers(0, 100))
def test_more_coverage_takes_no_fewer_tokens_and_the_bounds_hold(mass, one, other, low, high, exact):
    (least, most), total = sorted((low, high)), len(mass) + exact
    none = torch.empty(0, dtype=torch.int64)
    fewer, more = (
        Coverage(share, least, most).tokens(torch.tensor(mass), none, total) for share in sorted((one, other))
    )
    assert fewer <= more <= min(count_of(most, total), len(mass))
    assert fewer >= min(count_of(least, total), len(mass))


def test_all_of_it_leaves_out_only_what_nobody_looks_at():
    mass, none = torch.tensor([0.5, 0.0, 0.25, 0.0]), torch.empty(0, dtype=torch.int64)
    assert Coverage(1.0, 0.0, 1.0).tokens(mass, none, 4) == 2
    assert Coverage(0.0, 0.0, 1.0).tokens(mass, none, 4) == 0
    assert Coverage(1.0, 0.0, 1.0).tokens(mass[:0], none, 4) == 0


def test_small_masses_add_up_over_a_long_prompt():
    mass, none = torch.full((1_000_000,), 1e-3), torch.empty(0, dtype=torch.int64)
    mass[0] = 1e5
    needed = Coverage(0.9999, 0.0, 1.0).tokens(mass, none, len(mass))
    assert needed == 1 + -int(-(0.9999 * (1e5 + 999_999 * float(mass[1])) - 1e5) // float(mass[1]))


@pytest.mark.parametrize(
    ("share", "least", "most"),
    [(-0.1, 0.0, 1.0), (1.1, 0.0, 1.0), (float("nan"), 0.0, 1.0), (0.5, 0.3, 0.2), (0.5, -0.1, 0.2), (0.5, 0.1, 1.2)],
)
def test_an_impossible_coverage_is_one_clear_line(share, least, most):
    with pytest.raises(ConfigError, match=rf"a coverage needs .* got share {share}, least {least}, most {most}$"):
        Coverage(share, least, most)


def test_the_configuration_says_a_number_or_what_is_covered():
    assert configured_ratio(BlendConfig(ratio=0.2)) == most_of(0.2) == 0.2
    auto = configured_ratio(BlendConfig(ratio="auto", auto_coverage=0.6, auto_least=0.1, auto_most=0.2))
    assert auto == Coverage(0.6, 0.1, 0.2)
    assert most_of(auto) == 0.2
