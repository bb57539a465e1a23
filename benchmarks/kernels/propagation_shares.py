"""Shares of change propagation over the chunks of one prompt, found once a request."""

from __future__ import annotations

import torch
from kernel_case import KernelCase

from ragkit.kernels.backend import Backend
from ragkit.kernels.propagation_plan import TILE_ROWS, plan_propagation
from ragkit.kernels.propagation_shares import propagation_shares, propagation_shares_torch
from ragkit.kernels.testing import assert_matches

CHUNK = 256
SIGMA = 96.0


def cases(device: torch.device) -> list[KernelCase]:
    """Return 15% of 32K rows; on a CPU a small case."""
    rows = 32768 if device.type == "cuda" else 2 * CHUNK
    selected = torch.randperm(rows, device=device)[: int(rows * 0.15)].sort().values
    starts = torch.arange(0, rows + 1, CHUNK, device=device)
    plan = plan_propagation(selected, starts, torch.searchsorted(selected, starts), SIGMA)
    inputs = (plan.selected, plan.stands_for, plan.tiles)
    options = {"rows": rows, "sigma": SIGMA, "reach": plan.reach}

    def run() -> torch.Tensor:
        return propagation_shares(*inputs, tile_rows=TILE_ROWS, **options, backend=Backend.TRITON)

    def check() -> None:
        assert_matches(run(), propagation_shares_torch(*inputs, **options))

    return [
        KernelCase(
            name="propagation_shares",
            shape=f"{len(selected):,} of {rows:,} rows recomputed, chunks of {CHUNK}",
            run=run,
            check=check,
            work=4.0 * rows + 12.0 * len(selected) + 16.0 * len(plan.tiles),
            kind="bandwidth",
        )
    ]
