import math

import pytest
import torch

from ragkit.errors import KernelInputError
from ragkit.kernels import kmeans_assign as module
from ragkit.kernels.backend import Backend
from ragkit.kernels.kmeans_assign import Nearness, kmeans_assign, kmeans_assign_torch
from ragkit.kernels.testing import EDGE_TOKENS, assert_matches, guarded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _keys(tokens, kv_heads, head_dim, dtype, device, rng):
    """Keys as a view over a fused projection."""
    fused = guarded(torch.randn(tokens, kv_heads + 1, head_dim, device=device, generator=rng).to(dtype))
    fused[:, 0] = math.nan
    return fused[:, 1:]


def _centroids(count, kv_heads, head_dim, device, rng):
    return guarded(torch.randn(count, kv_heads, head_dim, device=device, generator=rng) * 2)


def _compare(keys, centroids, nearness, unit_sums=False):
    labels, sums, counts = kmeans_assign(
        keys, centroids, nearness=nearness, unit_sums=unit_sums, backend=Backend.TRITON
    )
    assert (labels.dtype, sums.dtype, counts.dtype) == (torch.int32, torch.float32, torch.int32)
    # Two centroids as near as the type can tell may be exchanged: what was chosen is compared by its nearness.
    unit = module._compared(centroids, nearness)
    products = torch.einsum("thd,chd->thc", keys.float(), unit.to(keys.dtype).float())
    chosen = products.gather(2, labels.long()[..., None]).squeeze(2)
    if labels.numel():
        assert float((products.amax(dim=2) - chosen).max()) <= 1e-5 * float(products.abs().max())
    wide = keys.double()
    if unit_sums:
        wide = wide / wide.norm(dim=2, keepdim=True)
    expected = torch.zeros(centroids.shape, dtype=torch.float64, device=keys.device)
    expected.scatter_add_(0, labels.long()[..., None].expand(keys.shape), wide)
    assert_matches(sums, expected.float())
    for head in range(keys.shape[1]):
        assert torch.equal(counts[:, head].long(), torch.bincount(labels[:, head], minlength=len(centroids)))


@pytest.mark.parametrize("tokens", EDGE_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nearness", list(Nearness))
def test_finds_the_nearest_and_sums_what_it_found(nearness, dtype, tokens, device, rng):
    _compare(_keys(tokens, 3, 32, dtype, device, rng), _centroids(20, 3, 32, device, rng), nearness)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("count", [1, 16, 33])
def test_every_head_size_and_number_of_centroids(count, head_dim, device, rng):
    keys = _keys(20, 2, head_dim, torch.bfloat16, device, rng)
    _compare(keys, _centroids(count, 2, head_dim, device, rng), Nearness.COSINE, unit_sums=True)


@pytest.mark.parametrize("held", [1, 1 << 24])
@pytest.mark.parametrize("nearness", list(Nearness))
def test_kernel_and_definition_agree_where_clusters_are_apart(nearness, held, device, rng, monkeypatch):
    monkeypatch.setattr(module, "_TORCH_SCORES", held)
    centroids = _centroids(40, 2, 64, device, rng)
    truth = torch.randint(0, 40, (70, 2), device=device, generator=rng)
    keys = centroids.gather(0, truth[..., None].expand(70, 2, 64))
    keys = keys + 0.1 * torch.randn(keys.shape, device=device, generator=rng)
    got = kmeans_assign(keys, centroids, nearness=nearness, backend=Backend.TRITON)
    expected = kmeans_assign_torch(keys, centroids, nearness=nearness)
    assert torch.equal(expected.labels.long(), truth)
    assert torch.equal(got.labels, expected.labels)
    assert torch.equal(got.counts, expected.counts)
    assert_matches(got.sums, expected.sums)


@pytest.mark.parametrize("backend", list(Backend))
def test_by_the_cosine_a_centroid_gains_nothing_from_its_length(backend, device):
    keys = torch.tensor([[[3.0, 0.3]], [[0.1, 2.0]]], device=device).repeat(1, 1, 8)
    centroids = torch.tensor([[[1.0, 0.0]], [[9.0, 9.0]], [[0.0, 1.0]]], device=device).repeat(1, 1, 8)
    by_dot = kmeans_assign(keys, centroids, nearness=Nearness.DOT, backend=backend)
    assert by_dot.labels.tolist() == [[1], [1]]
    by_cosine = kmeans_assign(keys, centroids, nearness=Nearness.COSINE, backend=backend)
    assert by_cosine.labels.tolist() == [[0], [2]]
    assert by_cosine.counts.tolist() == [[1], [0], [1]]
    assert torch.equal(by_cosine.sums[1], torch.zeros_like(by_cosine.sums[1]))


@pytest.mark.parametrize("backend", list(Backend))
def test_of_equal_centroids_the_lower_one_is_taken(backend, device, rng):
    keys = _keys(30, 2, 16, torch.float32, device, rng)
    centroids = _centroids(4, 2, 16, device, rng).repeat(40, 1, 1)  # each again in other columns and in other tiles
    labels = kmeans_assign(keys, centroids, nearness=Nearness.DOT, backend=backend).labels
    assert int(labels.max()) < 4


@pytest.mark.parametrize("backend", list(Backend))
def test_unit_sums_are_of_keys_of_length_one(backend, device, rng):
    keys = _keys(50, 2, 16, torch.float32, device, rng) * 7
    step = kmeans_assign(
        keys, _centroids(1, 2, 16, device, rng), nearness=Nearness.DOT, unit_sums=True, backend=backend
    )
    assert_matches(step.sums[0], (keys / keys.norm(dim=2, keepdim=True)).sum(dim=0))
    assert step.counts.tolist() == [[50, 50]]


def test_two_runs_give_the_same_bits(device, rng):
    keys, centroids = _keys(200, 2, 32, torch.bfloat16, device, rng), _centroids(7, 2, 32, device, rng)
    runs = [kmeans_assign(keys, centroids, nearness=Nearness.DOT, backend=Backend.TRITON) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_inputs_that_do_not_fit_are_refused(device, rng):
    keys, centroids = _keys(4, 2, 16, torch.float32, device, rng), _centroids(3, 2, 16, device, rng)
    for wrong, other, message in (
        (keys[0], centroids, r"keys must be \(tokens, kv_heads, head_dim\)"),
        (keys.transpose(0, 1).contiguous().transpose(0, 1), centroids, "of keys must be contiguous"),
        (keys, centroids[:0], r"centroids must be \(one or more, 2, 16\), got \(0, 2, 16\)"),
        (keys, centroids[:, :1], r"centroids must be \(one or more, 2, 16\), got \(3, 1, 16\)"),
    ):
        with pytest.raises(KernelInputError, match=message):
            kmeans_assign(wrong, other, nearness=Nearness.DOT)
