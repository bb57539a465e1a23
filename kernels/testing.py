"""Tools of kernel tests: one tolerance table, poisoned surroundings of inputs, canaries around outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Largest error allowed, as a share of the reference's largest value.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EDGE_TOKENS = (0, 1, 15, 16, 17, 63)
CANARY = 77.0
_GUARD_ROWS = 3


def assert_matches(got: Tensor, reference: Tensor, *, reduced: int = 1) -> None:
    """Fail unless `got` is close to `reference` by its largest and by its RMS error.

    Args:
        got: what the kernel returned.
        reference: the same from the torch definition, computed from fp32 inputs.
        reduced: number of terms that each result sums; the bounds grow with its square root.
    """
    assert got.shape == reference.shape, f"shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    if got.numel() == 0:
        return
    expected, actual = reference.double(), got.double()
    assert torch.equal(torch.isfinite(actual), torch.isfinite(expected)), "finite values at other places"
    finite = torch.isfinite(expected)
    error = (actual - expected)[finite].abs()
    bound = TOLERANCE[got.dtype] * math.sqrt(reduced)
    scale = max(float(expected[finite].abs().max()), 1e-6)
    rms = max(float(expected[finite].square().mean().sqrt()), 1e-6)
    worst, typical = float(error.max()) / scale, float(error.square().mean().sqrt()) / rms
    assert worst <= bound, f"largest error {worst:.2e} of the largest value, allowed {bound:.2e}"
    assert typical <= bound, f"RMS error {typical:.2e} of the RMS value, allowed {bound:.2e}"


def guarded(tensor: Tensor, fill: float = math.nan) -> Tensor:
    """Return a copy of `tensor` that is a view into rows of `fill`: reading past its end poisons the result."""
    rows = tensor.shape[0] + 2 * _GUARD_ROWS
    outer = torch.full((rows, *tensor.shape[1:]), fill, dtype=tensor.dtype, device=tensor.device)
    inner = outer[_GUARD_ROWS : rows - _GUARD_ROWS]
    inner.copy_(tensor)
    return inner


def canaried(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """Return an output view between canary rows, and a check that fails if the kernel wrote outside the view."""
    outer = torch.full((shape[0] + 2 * _GUARD_ROWS, *shape[1:]), CANARY, dtype=dtype, device=device)

    def check() -> None:
        around = torch.cat((outer[:_GUARD_ROWS], outer[-_GUARD_ROWS:]))
        assert bool((around == CANARY).all()), "the kernel wrote outside its output"

    return outer[_GUARD_ROWS : shape[0] + _GUARD_ROWS], check
