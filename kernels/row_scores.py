"""Scores of rows with rows in fp32: `left right^T`, by the library that multiplies fastest on the device.

Torch gives fp32 products on a CPU to MKL, which on processors that are not Intel's leaves half of the vector width
unused: measured on an AMD core with AVX-512, 192 x 64 by 64 x 4096 takes 1.05 ms there and 0.46 ms in oneDNN.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_MULTIPLE = 64  # oneDNN compiles for each new shape: who pads to this meets few of them
SHIFT = 36.0  # what `row_exponentials` subtracts
MOST_SCORE = SHIFT - 6.5  # up to which its relative error stays below bf16's own rounding
LEAST_SCORE = SHIFT - 86.0  # below, nothing is left of it


def row_scores(left: Tensor, right: Tensor) -> Tensor:
    """Return (m, n) fp32 for `left` (m, size) and `right` (n, size), both fp32 and contiguous."""
    if left.device.type != "cpu" or left.numel() == 0 or not torch.backends.mkldnn.is_available():
        return left @ right.T
    scores: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return scores


def row_exponentials(left: Tensor, right: Tensor) -> Tensor:
    """Return `exp(left right^T - SHIFT)` (m, n) in bf16 for `left` (m, size) and `right` (n, size), both bf16.

    The scores never leave the registers: they are summed in fp32, and only the exponential is rounded. The logistic
    function, which oneDNN takes of a product as it writes it, is the exponential within a share of `exp(x)`: far below
    zero the two are one. So it holds for scores between LEAST_SCORE and MOST_SCORE; above, it bends towards 1.
    Measured on one AMD core with AVX-512, 384 x 64 by 64 x 1,536: 300 us, and 620 us for fp32 scores, their softmax and
    its rounding.
    """
    if left.device.type != "cpu" or left.numel() == 0 or not torch.backends.mkldnn.is_available():
        return torch.exp(left.float() @ right.float().T - SHIFT).to(left.dtype)
    shift = left.new_full((len(right),), -SHIFT)
    exponentials: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, shift, "sigmoid", [], "")
    return exponentials


def padded_rows(rows: int) -> int:
    """Return `rows` rounded up to the next multiple of `ROWS_MULTIPLE`."""
    return -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE
