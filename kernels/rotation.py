"""Rotation of heads by position in torch, which the definitions of several kernels share.

    out = R(position) x:   out_i = x_i cos_i - x_(i + d/2) sin_i,   out_(i + d/2) = x_(i + d/2) cos_i + x_i sin_i

Source: RoFormer, arXiv 2104.09864, section 3.4.2, half-split.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_into(out: Tensor, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write `heads` rotated into `out`, computed in fp32.

    Args:
        out: like `heads`, of any float type; the two may not overlap.
        heads: (tokens, heads, head_dim).
        cos, sin: (tokens, head_dim / 2) fp32.
    """
    half = heads.shape[2] // 2
    # Head after head: torch on a CPU passes over a matrix several times as fast as over a broadcast third dimension.
    for target, source in zip(out.unbind(1), heads.unbind(1), strict=True):
        first, second = source[:, :half].float(), source[:, half:].float()
        if out.dtype is torch.float32:
            torch.mul(first, cos, out=target[:, :half]).addcmul_(second, sin, value=-1)
            torch.mul(second, cos, out=target[:, half:]).addcmul_(first, sin)
        else:
            target[:, :half] = (first * cos).addcmul_(second, sin, value=-1)
            target[:, half:] = (second * cos).addcmul_(first, sin)
