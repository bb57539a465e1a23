"""The best pages of documents up to a million tokens in pages of 64, of one list and of one a key head."""

from __future__ import annotations

import torch
from kernel_case import KernelCase

from ragkit.kernels.backend import Backend
from ragkit.kernels.page_top_k import page_top_k, page_top_k_torch


def cases(device: torch.device) -> list[KernelCase]:
    """Return 64 of 2K, 8K and 16K pages, and 256 of 16K; on a CPU one small case."""
    sizes = ((2048, 64), (8192, 64), (16384, 64), (16384, 256)) if device.type == "cuda" else ((300, 20),)
    return [_case(rows, pages, k, device) for pages, k in sizes for rows in (1, 8)]


def _case(rows: int, pages: int, k: int, device: torch.device) -> KernelCase:
    scores = torch.randn(rows, pages, device=device)
    bounds = torch.tensor([2, pages - 8, pages], dtype=torch.int32, device=device)

    def run() -> object:
        return page_top_k(scores, k, bounds=bounds, keep_rest=True, follow=0.5, backend=Backend.TRITON)

    def check() -> None:
        got = page_top_k(scores, k, bounds=bounds, keep_rest=True, follow=0.5, backend=Backend.TRITON)
        expected = page_top_k_torch(scores, k, bounds=bounds, keep_rest=True, follow=0.5)
        for mine, reference in zip(got, expected, strict=True):
            assert torch.equal(mine, reference)

    return KernelCase(
        name="page_top_k",
        shape=f"{k} of {pages:,} pages, {rows} rows",
        run=run,
        check=check,
        work=rows * 4 * (pages + k),
        kind="bandwidth",
        baseline_name="torch.topk, its pages sorted",
        baseline=lambda: torch.topk(scores, k, sorted=False).indices.sort(dim=1),
    )
