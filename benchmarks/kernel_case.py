"""One measured case of a kernel: what `kernel_speed.py` runs, and what a module of `benchmarks/kernels` gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one shape.

    Attributes:
        name: what is measured.
        shape: of its inputs, for the table.
        run: does the work once.
        check: fails unless what `run` gives agrees with the reference; called before anything is timed.
        work: bytes read and written, or useful floating-point operations, of one run.
        kind: which ceiling holds: the card's copy bandwidth, or its fastest dense attention.
        baseline_name: the strongest simple way to do the same, by name.
        baseline: does the same work in that way once; None where there is none.
    """

    name: str
    shape: str
    run: Callable[[], object]
    check: Callable[[], None]
    work: float
    kind: Literal["bandwidth", "compute"]
    baseline_name: str = ""
    baseline: Callable[[], object] | None = None


def attention_flops(positions: Tensor, q_heads: int, head_dim: int) -> float:
    """Return the useful operations of causal attention from `positions`: what is masked does not count."""
    return 4.0 * head_dim * q_heads * float((positions.long() + 1).sum())


def selected_positions(rows: int, share: float, question: int, device: torch.device) -> Tensor:
    """Return ascending int32 positions: `share` of the rows before the question, scattered, then `question` rows."""
    generator = torch.Generator().manual_seed(rows)
    before = rows - question
    scattered = torch.randperm(before, generator=generator)[: int(share * rows)].sort().values
    return torch.cat((scattered, torch.arange(before, rows))).int().to(device)
