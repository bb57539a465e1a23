import math

import pytest
import torch

from ragkit.kernels import merge_at_end as module
from ragkit.kernels.backend import jit, next_power_of_2, tl
from ragkit.kernels.launched import launched
from ragkit.kernels.merge_at_end import end_counters, merge_at_end, merges_at_end
from ragkit.kernels.merge_splits import merge_splits_torch
from ragkit.kernels.testing import CANARY, assert_matches, canaried

pytest.importorskip("triton")


@launched
def _copy_and_merge_kernel(
    given_ptr, given_weight_ptr, partial_ptr, weight_ptr, out_ptr, counter_ptr, count, stride, splits,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    # This program has one part of the heads of its group: those of tokens at a stride.
    group, split = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, HEADS)
    head = group * GROUP + index // GROUP * stride + index % GROUP
    dim = tl.arange(0, DIM_PADDED)
    part = head * splits + split
    _copy(given_weight_ptr + part, weight_ptr + part, index < count)
    at = part[:, None] * HEAD_DIM + dim[None, :]
    _copy(given_ptr + at, partial_ptr + at, (index < count)[:, None] & (dim < HEAD_DIM)[None, :])
    merge_at_end(
        partial_ptr, weight_ptr, out_ptr, counter_ptr + group, group * GROUP, count, stride, splits,
        GROUP, HEAD_DIM, DIM_PADDED,
    )  # fmt: skip


@jit
def _copy(source_ptr, target_ptr, mask):
    tl.store(target_ptr, tl.load(source_ptr, mask=mask), mask=mask)


def _parts(tokens, heads, splits, head_dim, device, rng):
    partial = torch.randn(tokens, heads, splits, head_dim, device=device, generator=rng)
    return partial, torch.randn(tokens, heads, splits, device=device, generator=rng) * 5


def _merged(partial, weights, out, counters, groups):
    """Attention over all parts, its heads in `groups`, whose programs share a counter; parts start as NaN."""
    tokens, heads, splits, head_dim = partial.shape
    group = heads // groups
    own, own_weights = torch.full_like(partial, math.nan), torch.full_like(weights, math.nan)
    _copy_and_merge_kernel[(groups, splits)](
        partial, weights, own, own_weights, out, counters, tokens * group, heads, splits,
        GROUP=group, HEADS=next_power_of_2(tokens * group), HEAD_DIM=head_dim,
        DIM_PADDED=max(16, next_power_of_2(head_dim)),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "groups", "group", "splits", "head_dim"),
    [(1, 2, 4, 1, 32), (1, 1, 1, 3, 80), (1, 2, 3, 17, 128), (3, 2, 3, 9, 256), (2, 3, 2, 40, 64)],
)
def test_the_last_program_writes_what_a_kernel_of_its_own_would(
    tokens, groups, group, splits, head_dim, dtype, device, rng
):
    partial, weights = _parts(tokens, groups * group, splits, head_dim, device, rng)
    out, check = canaried((tokens, groups * group, head_dim), dtype, device)
    counters = end_counters(groups, device)
    _merged(partial, weights, out, counters, groups)
    check()
    assert_matches(out, merge_splits_torch(partial, weights), reduced=4)
    assert counters.tolist() == [0] * groups


def test_launches_one_after_the_other_share_counters(device, rng):
    counters = end_counters(2, device)
    for splits in (3, 1, 8, 5):
        partial, weights = _parts(1, 4, splits, 64, device, rng)
        out = torch.full((1, 4, 64), CANARY, device=device)
        _merged(partial, weights, out, counters, 2)
        assert_matches(out, merge_splits_torch(partial, weights), reduced=4)


def test_before_the_last_program_nothing_is_written(device, rng):
    partial, weights = _parts(1, 2, 4, 32, device, rng)
    out = torch.full((1, 2, 32), CANARY, device=device)
    counters = end_counters(1, device)
    counters.fill_(-1)  # as if there were one more to come
    _merged(partial, weights, out, counters, 1)
    assert torch.equal(out, torch.full_like(out, CANARY))
    assert counters.tolist() == [3]
    counters.zero_()


def test_a_part_in_which_nothing_was_seen_counts_for_nothing(device, rng):
    partial, weights = _parts(1, 2, 3, 32, device, rng)
    partial[:, :, 1], weights[:, :, 1] = 0.0, -math.inf
    weights[:, 1] = -math.inf
    out = torch.empty(1, 2, 32, device=device)
    _merged(partial, weights, out, end_counters(1, device), 1)
    assert_matches(out[:, 0], merge_splits_torch(partial, weights)[:, 0], reduced=4)
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1]))


@pytest.mark.parametrize(
    ("heads", "splits", "head_dim", "merges"),
    [
        (4, 80, 128, True),
        (4, 81, 128, False),
        (5, 32, 128, True),
        (5, 33, 128, False),
        (4, 160, 64, True),
        (21, 1, 8, 0),
    ],
)
def test_one_program_merges_what_few_rounds_of_loads_bring(heads, splits, head_dim, merges):
    assert merges_at_end(heads, splits, head_dim) == merges


def test_counters_of_launches_lie_apart_until_the_ring_is_round(device, monkeypatch):
    monkeypatch.setattr(module, "_RING", 1 << 10)
    monkeypatch.setattr(module, "_MOST_COUNTERS", 16)
    monkeypatch.setattr(module, "_rings", {})
    taken = [end_counters(number, device) for number in (3, 16, 1, 5)]
    starts = [counters.data_ptr() for counters in taken]
    assert [start - starts[0] for start in starts] == [0, 16, 80, 96]
    assert all(start % 16 == 0 for start in starts)
    assert all(not counters.any() for counters in taken)
    again = [end_counters(16, device).data_ptr() for _ in range(1 << 6)]
    assert again[-4:] == [starts[0] + 64 * at for at in (62, 63, 0, 1)]
    assert end_counters(17, device) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_replays_with_counters_of_its_own(device, rng):
    partial, weights = _parts(1, 32, 64, 128, device, rng)
    out, counters = torch.empty(1, 32, 128, device=device), end_counters(8, device)
    _merged(partial, weights, out, counters, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _merged(partial, weights, out, counters, 8)
    for _ in range(20):
        partial.normal_(generator=rng)
        graph.replay()
        assert_matches(out, merge_splits_torch(partial, weights), reduced=4)
    assert not counters.any()
