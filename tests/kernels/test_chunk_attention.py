from itertools import pairwise

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.chunk_attention import chunk_attention
from ragkit.kernels.testing import assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _inputs(sizes, q_heads, kv_heads, head_dim, dtype, device, rng, prefix=7, every=1):
    """Queries as a view over a fused projection, at every so many positions of chunks of the given sizes."""
    cu_rows = [prefix]
    for size in sizes:
        cu_rows.append(cu_rows[-1] + size)
    positions = torch.arange(prefix, cu_rows[-1], every, device=device)
    fused = guarded(torch.randn(len(positions), q_heads + 2, head_dim, device=device, generator=rng).to(dtype))
    keys = torch.randn(cu_rows[-1], kv_heads, head_dim, device=device, generator=rng).to(dtype)
    return fused[:, :q_heads], guarded(keys), positions, cu_rows


def _by_the_matrix(queries, keys, positions, cu_rows, scale):
    """The definition: all weights at once, in float64, chunk after chunk."""
    keys = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", queries.double(), keys) * scale
    later = torch.arange(len(keys), device=keys.device) > positions[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(-1).sum(0)
    inter, density, intra = torch.zeros((3, len(positions)), dtype=torch.float64, device=keys.device)
    for token, position in enumerate(positions.tolist()):
        for start, stop in pairwise(cu_rows):
            part = weights[token, start:stop].sum()
            if start <= position < stop:
                intra[token] = part
            elif stop <= position and stop > start:
                inter[token] += part
                density[token] += part / (stop - start)
    return inter, density, intra


def _compare(inputs, backend=None, reduced=4):
    scale = inputs[0].shape[-1] ** -0.5
    got = chunk_attention(*inputs, scale=scale, backend=backend)
    expected = _by_the_matrix(*inputs, scale)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        assert_matches(one.to(inputs[0].dtype), other, reduced=reduced)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [1, 3])
def test_sums_are_those_of_the_whole_matrix(backend, dtype, every, device, rng):
    _compare(_inputs([20, 33, 5, 41], 6, 2, 32, dtype, device, rng, every=every), backend)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [13, 14, 15, 28, 31])
def test_more_chunks_than_a_head_has_channels_go_in_groups(backend, dtype, chunks, device, rng):
    sizes = [1 + 7 * index % 10 for index in range(chunks)]
    _compare(_inputs(sizes, 4, 2, 16, dtype, device, rng), backend)


def test_tokens_of_some_groups_only_are_summed(device, rng):
    queries, keys, positions, cu_rows = _inputs([5] * 40, 2, 1, 16, torch.float32, device, rng)
    kept = (positions > 100) & (positions < 120)  # the second of three groups
    _compare((queries[kept], keys, positions[kept], cu_rows))


@pytest.mark.parametrize("sizes", [[0, 9, 0, 0, 12], [30], [1, 1, 1]])
def test_empty_and_tiny_chunks_count_for_nothing_more(sizes, device, rng):
    _compare(_inputs(sizes, 2, 2, 16, torch.float32, device, rng))


def test_without_a_prefix_all_weight_is_inter_or_intra(device, rng):
    inputs = _inputs([20, 30, 25], 4, 2, 32, torch.float32, device, rng, prefix=0)
    inter, _, intra = chunk_attention(*inputs, scale=0.3)
    torch.testing.assert_close(inter + intra, torch.full((75,), 4.0, device=device), rtol=0, atol=1e-5)
    assert torch.equal(inter[:20], torch.zeros(20, device=device))
    assert float(inter[20:].min()) > 0


def test_a_token_that_looks_at_one_earlier_chunk_gives_it_all(device, rng):
    queries, keys, positions, cu_rows = _inputs([10, 20, 30], 2, 1, 16, torch.float32, device, rng)
    keys.zero_()
    keys[20] = 9.0  # in the second chunk
    queries.fill_(9.0)
    inter, density, intra = chunk_attention(queries, keys, positions, cu_rows, scale=1.0)
    third = slice(30, 60)
    torch.testing.assert_close(inter[third], torch.full((30,), 2.0, device=device))
    torch.testing.assert_close(density[third], torch.full((30,), 0.1, device=device))
    assert float(intra[third].max()) < 1e-6
    torch.testing.assert_close(intra[13:30], torch.full((17,), 2.0, device=device))


def test_two_runs_give_the_same_bits(device, rng):
    inputs = _inputs([50, 60, 70], 4, 2, 32, torch.bfloat16, device, rng)
    for one, other in zip(*(chunk_attention(*inputs, scale=0.2) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_no_tokens_give_no_sums(device, rng):
    queries, keys, positions, cu_rows = _inputs([5, 6], 2, 1, 16, torch.float32, device, rng)
    for got in chunk_attention(queries[:0], keys, positions[:0], cu_rows, scale=1.0):
        assert got.shape == (0,)


@pytest.mark.parametrize("cu_rows", [[7], [-1, 18], [7, 12, 11, 18], [7, 12], [7, 19]])
def test_boundaries_that_do_not_ascend_to_the_last_row_are_refused(cu_rows, device, rng):
    queries, keys, positions, _ = _inputs([5, 6], 2, 1, 16, torch.float32, device, rng)
    with pytest.raises(KernelInputError, match="cu_rows must ascend to the 18 rows"):
        chunk_attention(queries, keys, positions, cu_rows, scale=1.0)


def test_a_token_before_the_chunks_is_refused(rng):
    cpu = torch.device("cpu")
    queries, keys, positions, _ = _inputs([5, 6], 2, 1, 16, torch.float32, cpu, torch.Generator().manual_seed(0))
    with pytest.raises(KernelInputError, match="positions must lie in chunks, from 12 up, got 7"):
        chunk_attention(queries, keys, positions, [12, 18], scale=1.0)
