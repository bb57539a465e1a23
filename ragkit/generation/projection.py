"""A matrix product with fixed weights, in the layout that the device multiplies fastest."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

# oneDNN chooses its blocking for this many rows; blocks for many rows measured no worse for one row.
_PACKED_FOR_ROWS = 256
_PACKABLE = (torch.float32, torch.bfloat16)


class Linear(Protocol):
    """`x -> x weight^T + bias`, however the weights are kept."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return (tokens, out) for `rows` (tokens, in)."""
        ...


class Projection:
    """`x -> x weight^T + bias`, with (out, in) weights.

    On a CPU the weights are re-ordered once for oneDNN. Measured for the bundled 135M model's shapes on an AMD core
    with AVX-512 against torch's plain product: about twice as fast for 417 rows in fp32, and for one row in bf16.
    """

    __slots__ = ("_bias", "_is_packed", "_weight", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features = weight.shape[0]
        self._bias = bias
        self._is_packed = (
            weight.device.type == "cpu" and weight.dtype in _PACKABLE and torch.backends.mkldnn.is_available()
        )
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
            if self._is_packed
            else weight
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """Return (tokens, out) for `rows` (tokens, in)."""
        if not self._is_packed:
            return functional.linear(rows, self._weight, self._bias)
        if rows.shape[0] == 0:
            return rows.new_empty((0, self.out_features))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return product
