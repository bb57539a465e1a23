"""How coarse the channels of entropy-coded KV are: one step for each, by what its error does to the answer.

At equal bits the error does least where all channels weigh the same in it: a step then goes with the inverse root of
the loss's curvature in its channel. That curvature (Fisher information of the next token, from question and answer
tokens behind reused chunks of MuSiQue, in SmolLM2-135M and Qwen2.5-Coder-0.5B) was measured, and holds in both:

- Keys: it is the same for heads of small and of large keys, so steps are in units of the mean spread of all heads. It
  grows from RoPE's fastest pairs to its slowest by a factor of 30 to 100: 2^(6.9 x^2), x from 0 to 1 over the pairs.
- Values: it falls with the square of the head's spread, so steps are in units of that. An error in the lower third of
  the layers costs more on top: much in the one model, nothing in the other. Half the step is between the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.kvcache.codec import LayerKV

_FASTEST_PAIR = 1.1  # log2 of a key step at the fastest pair, in spreads
_SLOWER = 3.45  # how much of it is lost from the fastest pair to the slowest
_KEY_SPREAD = 0.43  # a key channel's step grows with this power of its own spread within its head
_LOWER_LAYERS, _UPPER_LAYERS = (
    1 / 3,
    1 / 2,
)  # of the depth: values have half steps up to here, and whole ones from there
_SMALLEST = 2.0**-30


def channel_steps(layers: Sequence[LayerKV], coarseness: float) -> list[Tensor]:
    """Return for each layer (2, kv_heads, head_dim) fp32 on the CPU: the steps of the keys, then of the values.

    Args:
        layers: keys before RoPE and values of a whole chunk.
        coarseness: step of the values of the upper layers, in standard deviations; all others are in proportion.
    """
    spreads = [torch.stack([_spread(heads) for heads in layer]) for layer in layers]
    key_unit = _mean_spread([spread[0] for spread in spreads])
    steps = []
    for index, spread in enumerate(spreads):
        keys, values = spread
        head = _head_spread(keys)
        own = (keys / head.clamp(min=_SMALLEST)) ** _KEY_SPREAD
        key_steps = key_unit * own * _pair_factor(keys.shape[1])
        value_steps = _head_spread(values).expand_as(values) * _depth_factor(index, len(layers))
        steps.append(coarseness * torch.stack((key_steps, value_steps)))
    return steps


def relative_steps(layer: int, num_layers: int, head_dim: int, coarseness: float) -> tuple[Tensor, float]:
    """Return the steps of a layer in standard deviations if all channels had the same: (head_dim,) keys, and values."""
    return coarseness * _pair_factor(head_dim), coarseness * _depth_factor(layer, num_layers)


def _pair_factor(head_dim: int) -> Tensor:
    """Return (head_dim,): the key step by the speed at which RoPE turns a channel; pairs are half a head apart."""
    pairs = head_dim // 2
    place = torch.arange(head_dim) % max(pairs, 1) / max(pairs - 1, 1)
    return torch.exp2(_FASTEST_PAIR - _SLOWER * place**2)


def _depth_factor(layer: int, num_layers: int) -> float:
    depth = layer / max(num_layers - 1, 1)
    lower = (_UPPER_LAYERS - depth) / (_UPPER_LAYERS - _LOWER_LAYERS)
    return math.exp2(-min(max(lower, 0.0), 1.0))


def _spread(heads: Tensor) -> Tensor:
    """Return (kv_heads, head_dim) fp32: standard deviation of each channel."""
    if len(heads) == 0:
        return torch.zeros(heads.shape[1:])
    return heads.float().cpu().var(0, correction=0).sqrt()


def _head_spread(spread: Tensor) -> Tensor:
    return spread.square().mean(1, keepdim=True).sqrt()


def _mean_spread(keys: Sequence[Tensor]) -> float:
    """Return the geometric mean of the spreads of all heads that have one."""
    heads = torch.cat([_head_spread(spread).flatten() for spread in keys]) if keys else torch.zeros(0)
    heads = heads[heads > _SMALLEST]
    return float(heads.log().mean().exp()) if len(heads) else 0.0
