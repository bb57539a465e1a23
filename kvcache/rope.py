"""Rotary position embedding: frequencies of every supported scaling, and the table of their cosines and sines.

Sources: RoFormer, arXiv 2104.09864, section 3.4.2 (default); position interpolation, arXiv 2306.15595 (linear);
NTK-aware scaling that follows the length (dynamic); YaRN, arXiv 2309.00071, section 3; Llama 3.1 (llama3).
Rotation is half-split: element i turns with element i + head_dim / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.kernels.rotate_heads import rotate_heads
from ragkit.models.model_config import RopeConfig, RopeType


def inv_freq(rope: RopeConfig, head_dim: int, length: int = 0) -> Tensor:
    """Return (head_dim / 2,) radians per position in fp32.

    Args:
        rope: the layer's settings.
        head_dim: size of one head.
        length: tokens that the sequence has; only `dynamic` looks at it, beyond its window.
    """
    if rope.rope_type is RopeType.DYNAMIC:
        stretched = max(length, rope.max_position) / rope.max_position
        theta = rope.theta * (rope.factor * stretched - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
        return _plain(theta, head_dim)
    plain = _plain(rope.theta, head_dim)
    if rope.rope_type is RopeType.LINEAR:
        return plain / rope.factor
    if rope.rope_type is RopeType.YARN:
        return _yarn(rope, plain, head_dim)
    if rope.rope_type is RopeType.LLAMA3:
        return _llama3(rope, plain)
    return plain


def has_own_frequencies(rope: RopeConfig, prompt_tokens: int) -> bool:
    """Return whether a prompt of so many tokens turns by frequencies that no other length has."""
    return rope.rope_type is RopeType.DYNAMIC and prompt_tokens > rope.max_position


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines by position, both (positions, head_dim / 2) fp32, YaRN's attention factor included.

    One table serves one request: `dynamic` frequencies follow the prompt's length and then stay, so that all keys
    of a request, which are kept un-rotated, turn with the same frequencies.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(
        cls, rope: RopeConfig, head_dim: int, positions: int, device: torch.device, length: int = 0
    ) -> RotaryTable:
        """Return the table for positions 0 to `positions` - 1; `length` is what `inv_freq` takes."""
        frequencies = inv_freq(rope, head_dim, length)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        return cls((angles.cos() * rope.attention_factor).to(device), (angles.sin() * rope.attention_factor).to(device))

    def rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return `heads` (tokens, heads, head_dim) rotated to `positions` (tokens,), in the dtype of `heads`."""
        return rotate_heads(heads, self.cos, self.sin, positions)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `heads` (tokens, heads, head_dim) turned by the angles of `cos`, `sin` (tokens, head_dim / 2)."""
    return rotate_heads(heads, cos, sin)


def _plain(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies: Tensor = 1.0 / (theta**exponents)
    return frequencies


def _yarn(rope: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    def dimension(rotations: float) -> float:
        # The dimension that turns `rotations` times within the original window.
        return head_dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    wavelength = 2 * math.pi / plain
    turns = rope.original_max_position / wavelength
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = torch.where(turns < rope.low_freq_factor, plain / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, plain, scaled)
