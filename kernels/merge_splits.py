# ruff: noqa: ANN001, ANN201, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Merge attention over parts of the keys into attention over all of them.

    out = sum_s 2^(w_s - max w) partial_s / sum_s 2^(w_s - max w)     w_s: base-2 log-sum-exp of part s

A part in which a query saw nothing has w_s = -inf and counts for nothing; with no other part the result is zero.

Over few keys it takes longer to begin than to run. Where a GPU can, it may be launched while the parts are computed:
its programs then stand ready, and wait until all parts lie in memory.

Source: the reduction of FlashDecoding; online softmax of FlashAttention, arXiv 2205.14135, section 3.1.
Cost: reads every part once; bandwidth bound.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, can_launch_early, ceil_div, jit, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched


class MergeLaunch(StrEnum):
    """When the merge is launched: after the kernel of the parts, or early, once all programs of that kernel say so."""

    AFTER = "after"
    AT_START = "at start"  # they say so first of all
    AT_END = "at end"  # before they store their parts


def merge_launch(wanted: MergeLaunch, device: torch.device) -> MergeLaunch:
    """Return when the merge is launched on a device: as wanted, or after the parts where nothing launches early."""
    return wanted if can_launch_early(device) else MergeLaunch.AFTER


def merge_splits(
    partial: Tensor,
    weights: Tensor,
    out: Tensor,
    log_sums: Tensor | None = None,
    *,
    launch: MergeLaunch = MergeLaunch.AFTER,
    by_warp: bool = False,
    backend: Backend | None = None,
) -> None:
    """Write the attention over all parts into `out` (tokens, q_heads, head_dim), contiguous, of any float type.

    Args:
        partial: (tokens, q_heads, splits, head_dim) fp32, the attention over each part, contiguous.
        weights: (tokens, q_heads, splits) fp32, base-2 log-sum-exp of each part's scores, contiguous.
        out: where the result goes.
        log_sums: (tokens, q_heads) fp32, contiguous; the weights merged over all parts go there.
        launch: early only behind the kernel that computes the parts, launched just before on the same stream; what
            `merge_launch` gives.
        by_warp: a program of one warp merges a few channels of a head, and not one of several warps all of them: on an
            H100 the compiler then has all loads under way before it waits for the first.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    if partial.dim() != 4 or weights.shape != partial.shape[:3] or out.shape != (*partial.shape[:2], partial.shape[3]):
        raise KernelInputError(
            f"parts {tuple(partial.shape)}, weights {tuple(weights.shape)} and out {tuple(out.shape)} do not fit"
        )
    if not (partial.is_contiguous() and weights.is_contiguous() and out.is_contiguous()):
        raise KernelInputError("parts, weights and out must be contiguous")
    if log_sums is not None and (log_sums.shape != weights.shape[:2] or not log_sums.is_contiguous()):
        raise KernelInputError(f"log_sums must be {tuple(weights.shape[:2])} contiguous, got {tuple(log_sums.shape)}")
    if resolve_backend(out, backend) is Backend.TORCH:
        out.copy_(merge_splits_torch(partial, weights))
        if log_sums is not None:
            log_sums.copy_(torch.logsumexp(weights * 0.6931471805599453, dim=-1) * 1.4426950408889634)
        return
    tokens, q_heads, splits, head_dim = partial.shape
    if out.numel() == 0:
        return
    early = launch is not MergeLaunch.AFTER
    padded, splits_padded = max(16, next_power_of_2(head_dim)), next_power_of_2(splits)
    channels = min(padded, 32 if splits_padded <= 32 else 16) if by_warp else padded
    _merge_splits_kernel[(tokens, q_heads, ceil_div(head_dim, channels))](
        partial, weights, out, out if log_sums is None else log_sums, splits,
        HEAD_DIM=head_dim, CHANNELS=channels, SPLITS_PADDED=splits_padded, WITH_LOG_SUMS=log_sums is not None,
        WAITS=early, num_warps=1 if by_warp else 4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def merge_splits_torch(partial: Tensor, weights: Tensor) -> Tensor:
    """Return (tokens, q_heads, head_dim) fp32, what `merge_splits` writes: the definition."""
    share = torch.nan_to_num((weights * 0.6931471805599453).softmax(dim=-1), nan=0.0)
    return torch.einsum("ths,thsd->thd", share, partial)


@jit
def call_merge(NOW: tl.constexpr):
    """Have the merge come, if NOW, when all programs of the kernel that calls have come here or ended."""
    if NOW:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def await_kernel_ahead(WAITS: tl.constexpr):
    """Wait, if WAITS, until the kernel ahead has ended and what it wrote is there: it may just have been launched."""
    if WAITS:
        tl.extra.cuda.gdc_wait()


@launched(do_not_specialize=("splits",))
def _merge_splits_kernel(
    partial_ptr, weight_ptr, out_ptr, log_sum_ptr, splits,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, SPLITS_PADDED: tl.constexpr, WITH_LOG_SUMS: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    # This program merges CHANNELS of the parts of one head of one token.
    head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split = tl.arange(0, SPLITS_PADDED)
    dim = tl.arange(0, CHANNELS)
    if CHANNELS < HEAD_DIM:
        dim += tl.program_id(2) * CHANNELS
    await_kernel_ahead(WAITS)
    weight = tl.load(weight_ptr + head * splits + split, mask=split < splits, other=float("-inf"))
    highest = tl.max(weight, axis=0)
    share = tl.exp2(weight - tl.where(highest == float("-inf"), 0.0, highest))
    mask = (split < splits)[:, None] & (dim < HEAD_DIM)[None, :]
    partial = tl.load(partial_ptr + (head * splits + split)[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
    total = tl.sum(share, axis=0)
    out = tl.sum(partial * share[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
    if WITH_LOG_SUMS:  # the programs of a head all store the same
        tl.store(log_sum_ptr + head, highest + tl.log2(tl.where(total > 0, total, 1.0)))
