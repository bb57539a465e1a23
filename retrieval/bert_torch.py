"""The BERT forward in torch: for documents, in bulk.

Tokens of all sequences lie packed, so that the matrix products see no padding; sequences of equal length stand
together, so that attention needs no mask. On the CPU the products go through oneDNN with weights packed once: MKL,
which `torch.nn.functional.linear` uses there, keeps to AVX2 on AMD processors, where oneDNN uses AVX-512. The two
agree within fp32 rounding; the choice is checked on construction, logged, and kept in `name`.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ragkit.retrieval.base import FloatMatrix
from ragkit.retrieval.bert_numpy import equal_length_groups
from ragkit.retrieval.bert_weights import BertLayer, BertWeights, pool_tokens

logger = logging.getLogger(__name__)

_ROW_STEP = 128
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only

Linear = Callable[[Tensor], Tensor]
AddLinear = Callable[[Tensor, Tensor], Tensor]


class TorchBert:
    """Runs packed sequences in fp32 on `device`; `name` says which matrix products it uses."""

    def __init__(self, weights: BertWeights, device: str) -> None:
        self._device = torch.device(device)
        self._heads = weights.heads
        self._epsilon = weights.epsilon
        self._pooling = weights.pooling
        self._words = self._tensor(weights.words)
        self._positions = self._tensor(weights.positions)
        self._norm = (self._tensor(weights.norm), self._tensor(weights.norm_bias))
        packed = self._device.type == "cpu" and onednn_works()
        self.name = "torch-onednn" if packed else f"torch-{self._device.type}"
        maker = _OneDnnLayer if packed else _PlainLayer
        self._layers = [maker(layer, weights.activation, self._tensor) for layer in weights.layers]

    @torch.inference_mode()
    def pooled(self, token_ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> FloatMatrix:
        """Return (sequences, hidden), not normalised; arguments as for `NumpyBert.pooled`."""
        return pool_tokens(self.token_states(token_ids, lengths).float().cpu().numpy(), lengths, self._pooling)

    @torch.inference_mode()
    def token_states(self, token_ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
        """Return (tokens, hidden) on the device; arguments as for `pooled`."""
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(len(token_ids)) - np.repeat(starts, lengths)
        ids = torch.from_numpy(token_ids).to(self._device)
        states = self._words[ids] + self._positions[torch.from_numpy(positions).to(self._device)]
        states = F.pad(states, (0, 0, 0, _spare_rows(len(token_ids))))
        states = F.layer_norm(states, states.shape[-1:], *self._norm, self._epsilon)
        groups = equal_length_groups(lengths)
        for layer in self._layers:
            context = self._attention(layer.qkv(states), groups)
            states = F.layer_norm(layer.out(context, states), states.shape[-1:], *layer.attention_norm, self._epsilon)
            inner = layer.up(states)
            states = F.layer_norm(layer.down(inner, states), states.shape[-1:], *layer.output_norm, self._epsilon)
        return states[: len(token_ids)]

    def return_memory(self) -> None:
        """Give free heap memory back to the system.

        Activations of ever other sizes leave holes that glibc keeps: gigabytes over a collection of 8,500 chunks.
        """
        if self._device.type == "cpu" and _malloc_trim is not None:
            _malloc_trim(0)

    def _attention(self, qkv: Tensor, groups: list[tuple[int, int, int]]) -> Tensor:
        hidden = qkv.shape[1] // 3
        context = qkv.new_zeros((qkv.shape[0], hidden))
        for start, count, length in groups:
            rows = slice(start, start + count * length)
            split = qkv[rows].view(count, length, 3, self._heads, hidden // self._heads).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(split[0], split[1], split[2])
            context[rows] = mixed.transpose(1, 2).reshape(count * length, hidden)
        return context

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        # torch wants writable memory, the mapped file is not; the copy also takes the weights off the page cache
        return torch.from_numpy(np.array(array, dtype=np.float32)).to(self._device)


def _spare_rows(rows: int) -> int:
    """Return how many rows to add, so that large batches come in few sizes.

    Every new size costs oneDNN a compiled product and the allocator a new hole: half a gigabyte over ten thousand
    chunks. The rows added are at most 3% of a batch.
    """
    return -rows % _ROW_STEP if rows >= 32 * _ROW_STEP else 0


class _PlainLayer:
    def __init__(self, layer: BertLayer, activation: str, tensor: Callable[[NDArray[Any]], Tensor]) -> None:
        activate = F.gelu if activation == "gelu" else F.relu
        qkv = (tensor(layer.qkv), tensor(layer.qkv_bias))
        out = (tensor(layer.out), tensor(layer.out_bias))
        up = (tensor(layer.up), tensor(layer.up_bias))
        down = (tensor(layer.down), tensor(layer.down_bias))
        self.qkv: Linear = lambda states: F.linear(states, *qkv)
        self.out: AddLinear = lambda context, states: F.linear(context, *out) + states
        self.up: Linear = lambda states: activate(F.linear(states, *up))
        self.down: AddLinear = lambda inner, states: F.linear(inner, *down) + states
        self.attention_norm = (tensor(layer.attention_norm), tensor(layer.attention_norm_bias))
        self.output_norm = (tensor(layer.output_norm), tensor(layer.output_norm_bias))


class _OneDnnLayer:
    def __init__(self, layer: BertLayer, activation: str, tensor: Callable[[NDArray[Any]], Tensor]) -> None:
        ops = torch.ops.mkldnn
        # naming the overload spares torch from trying the other one, which unpacks a tensor number by number
        single, binary = ops._linear_pointwise.default, ops._linear_pointwise.binary
        qkv = (ops._reorder_linear_weight(tensor(layer.qkv)), tensor(layer.qkv_bias))
        out = (ops._reorder_linear_weight(tensor(layer.out)), tensor(layer.out_bias))
        up = (ops._reorder_linear_weight(tensor(layer.up)), tensor(layer.up_bias))
        down = (ops._reorder_linear_weight(tensor(layer.down)), tensor(layer.down_bias))
        algorithm = "none" if activation == "gelu" else ""  # "none": the error function, not its tanh approximation
        self.qkv: Linear = lambda states: single(states, *qkv, "none", [], "")
        self.out: AddLinear = lambda context, states: binary(context, states, *out, "add")
        self.up: Linear = lambda states: single(states, *up, activation, [], algorithm)
        self.down: AddLinear = lambda inner, states: binary(inner, states, *down, "add")
        self.attention_norm = (tensor(layer.attention_norm), tensor(layer.attention_norm_bias))
        self.output_norm = (tensor(layer.output_norm), tensor(layer.output_norm_bias))


@torch.inference_mode()
def onednn_works() -> bool:
    """Return whether this torch carries the packed oneDNN products and they agree with the plain ones.

    The operators are those that torch.compile emits; they are not part of torch's public interface, so they are
    tried, with every form used here, before they are relied on.
    """
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(shape, generator=generator) for shape in ((5, 48), (32, 48), (32,)))
    other = torch.randn((5, 32), generator=generator)
    plain = F.linear(states, weight, bias)
    try:
        ops = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight)
        pairs = [
            (ops._linear_pointwise.default(states, packed, bias, "none", [], ""), plain),
            (ops._linear_pointwise.default(states, packed, bias, "gelu", [], "none"), F.gelu(plain)),
            (ops._linear_pointwise.default(states, packed, bias, "relu", [], ""), F.relu(plain)),
            (ops._linear_pointwise.binary(states, other, packed, bias, "add"), plain + other),
        ]
    except (AttributeError, RuntimeError) as error:
        logger.warning("torch %s has no packed oneDNN products (%s); documents embed slower", torch.__version__, error)
        return False
    if all(torch.allclose(got, expected, rtol=1e-5, atol=1e-5) for got, expected in pairs):
        return True
    logger.warning("the oneDNN products of torch %s differ from the plain ones; they are not used", torch.__version__)
    return False
