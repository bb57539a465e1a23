# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""What a model's logits say of the tokens that came: the cross-entropy of each row, without a copy in fp32.

    loss_t = log sum_v exp(x_tv) - x_t,target(t)

One pass over each row keeps the largest logit so far and the sum of exponentials relative to it (online softmax,
Milakov and Gimelshein, arXiv 1805.02867). A vocabulary of 150,000 takes 300 KB a token in bf16: a copy in fp32 and its
logarithms of softmax would be moved four more times.
Cost: reads every logit once; bandwidth bound.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched

_BLOCK = 4096  # logits of a row that a program holds at once


def cross_entropy(logits: Tensor, targets: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Return (tokens,) fp32 nats of `targets` under `logits`, computed in fp32.

    Args:
        logits: (tokens, vocab_size), rows contiguous.
        targets: (tokens,) int64, each below `vocab_size`.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: the shapes do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or (logits.numel() and logits.stride(1) != 1):
        raise KernelInputError(
            "logits must be (tokens, vocab_size) with contiguous rows and targets (tokens,), got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if resolve_backend(logits, backend) is Backend.TORCH:
        return cross_entropy_torch(logits, targets)
    tokens, vocab_size = logits.shape
    out = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if tokens:
        _cross_entropy_kernel[(tokens,)](
            logits, targets, out, vocab_size, logits.stride(0), BLOCK=min(_BLOCK, next_power_of_2(vocab_size))
        )
    return out


def cross_entropy_torch(logits: Tensor, targets: Tensor) -> Tensor:
    """Return what `cross_entropy` returns: the definition."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


@launched
def _cross_entropy_kernel(logit_ptr, target_ptr, out_ptr, vocab_size, stride_lt, BLOCK: tl.constexpr):
    # This program reduces the logits of one token, BLOCK at a time.
    token = tl.program_id(0).to(tl.int64)
    row = logit_ptr + token * stride_lt
    column = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)  # of each column of blocks
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        logit = tl.load(row + start + column, mask=start + column < vocab_size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, logit)
        # Where no logit but -inf was seen, there is nothing to rescale, and -inf less -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.exp(logit - shift)
        largest = higher
    top = tl.max(largest, axis=0)
    total_of_row = tl.sum(total * tl.exp(largest - top), axis=0)
    wanted = tl.load(row + tl.load(target_ptr + token)).to(tl.float32)
    tl.store(out_ptr + token, tl.log(total_of_row) + (top - wanted))
