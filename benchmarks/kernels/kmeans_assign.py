"""One step of K-means over a document's keys, at the shape of Llama 3 8B."""

from __future__ import annotations

import torch
from kernel_case import KernelCase
from kernel_inputs import compiled, kv_rows, model_shape
from torch import Tensor

from ragkit.kernels.backend import Backend
from ragkit.kernels.kmeans_assign import KMeansStep, Nearness, kmeans_assign, kmeans_assign_torch
from ragkit.kernels.testing import assert_matches


def cases(device: torch.device) -> list[KernelCase]:
    """Return 5% centroids of 32K tokens, and few centroids of 256K tokens; on a CPU a small case."""
    sizes = ((32768, 1638), (262144, 256)) if device.type == "cuda" else ((60, 7),)
    return [_case(tokens, count, device) for tokens, count in sizes]


def _case(tokens: int, count: int, device: torch.device) -> KernelCase:
    shape = model_shape(device)
    keys = kv_rows(tokens, shape, device)
    centroids = kv_rows(count, shape, device).float()

    def run() -> KMeansStep:
        return kmeans_assign(keys, centroids, nearness=Nearness.COSINE, backend=Backend.TRITON)

    def check() -> None:
        got = run()
        expected = kmeans_assign_torch(keys, centroids, nearness=Nearness.COSINE)
        # The centroids are rounded to the keys' type: of random keys some stand between two of them.
        assert float((got.labels != expected.labels).float().mean()) < 0.02
        sums = torch.zeros_like(got.sums).scatter_add_(0, got.labels.long()[..., None].expand(keys.shape), keys.float())
        assert_matches(got.sums, sums, reduced=4)

    return KernelCase(
        name="kmeans_assign",
        shape=f"{tokens:,} tokens, {count:,} centroids, {shape.kv_heads} heads of {shape.head_dim}",
        run=run,
        check=check,
        work=2.0 * shape.head_dim * shape.kv_heads * tokens * count,
        kind="compute",
        baseline_name="torch.compile of products, argmax and scatter_add",
        baseline=compiled(lambda: _materialised(keys, centroids), device),
    )


def _materialised(keys: Tensor, centroids: Tensor) -> Tensor:
    unit = (centroids / centroids.norm(dim=2, keepdim=True)).to(keys.dtype)
    labels = torch.bmm(keys.transpose(0, 1), unit.permute(1, 2, 0)).argmax(dim=2).T
    sums = torch.zeros_like(centroids)
    return sums.scatter_add_(0, labels[..., None].expand(keys.shape), keys.float())
