"""A decoder's copy with weights of 4 bits: less true, and several times less to read a step, which suits a drafter.

Norms, biases and the embedding stay as they are, and so does the product with the vocabulary unless it is asked for: it
is rounded worst (docs/speculative.md).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.errors import KernelInputError
from ragkit.generation.decoder import Decoder
from ragkit.generation.projection import Linear, Projection
from ragkit.generation.weights import load_weights
from ragkit.kernels.int4_linear import MOST_ROWS, Int4Weight, int4_linear, quantize_int4

_MOST_SLICED = 64  # rows that are multiplied a few at a time; more are multiplied by the weights as numbers
GROUP = 32  # columns that share a scale: wider ones save a bit a weight and lose most of what a small model knows
_CPU_FEATURES = 16  # torch's product on a CPU takes multiples of this


class Int4Projection:
    """`x -> x weight^T + bias` with weights of 4 bits.

    On a GPU `int4_linear` reads the codes, anew for every few rows; many rows are multiplied by the weights as numbers,
    which cost more to make. On a CPU it is torch's own product, whose scales are in the dtype of the rows.
    """

    __slots__ = ("_bias", "_on_cpu", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, group: int = GROUP) -> None:
        self._bias = bias
        self._weight = quantize_int4(weight, group)
        on_cpu = weight.device.type == "cpu" and weight.shape[0] % _CPU_FEATURES == 0
        self._on_cpu = _PackedForCPU(self._weight, weight.dtype) if on_cpu else None

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, their scales and zeros."""
        return self._weight.nbytes

    def __call__(self, rows: Tensor) -> Tensor:
        """Return (tokens, out) for `rows` (tokens, in)."""
        if self._on_cpu is not None:
            product = self._on_cpu(rows)
        elif len(rows) > _MOST_SLICED:
            return functional.linear(rows, self._weight.numbers(rows.dtype), self._bias)
        elif len(rows) > MOST_ROWS:
            product = torch.cat([int4_linear(some, self._weight) for some in rows.split(MOST_ROWS)])
        else:
            product = int4_linear(rows, self._weight)
        return product if self._bias is None else product + self._bias


class _PackedForCPU:
    """The same weights as torch's product on a CPU takes them: (code - 8) * scale + zero."""

    def __init__(self, weight: Int4Weight, dtype: torch.dtype) -> None:
        self._group = weight.group
        self._codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.unpacked(), 1)
        scales = weight.scales.float()
        self._scales = torch.stack((scales, weight.zeros.float() + 8 * scales), dim=-1).to(dtype).contiguous()

    def __call__(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), self._codes, self._group, self._scales
        )
        return product


def int4_linear_of(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return the product with weights of 4 bits, or in their own type where no group of columns divides them."""
    try:
        return Int4Projection(weight, bias)
    except KernelInputError:
        return Projection(weight, bias)


def int4_copy(decoder: Decoder, folder: Path, *, rounds_vocabulary: bool = False) -> Decoder:
    """Return `decoder` with weights of 4 bits, read anew from its `folder`; what is not rounded is shared.

    Raises:
        ModelError: the files are missing, damaged or another model's.
    """
    weights = load_weights(folder, decoder.config, decoder.device, decoder.dtype, int4_linear_of)
    head = weights.head if rounds_vocabulary else decoder.weights.head
    return Decoder(decoder.config, dataclasses.replace(weights, embedding=decoder.weights.embedding, head=head))
