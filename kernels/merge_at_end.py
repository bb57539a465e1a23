# ruff: noqa: ANN001, ANN201 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Merge attention over parts of the keys within the kernel that computes them: the last program to finish does it.

    out = sum_s 2^(w_s - max w) partial_s / sum_s 2^(w_s - max w)     w_s: base-2 log-sum-exp of part s

It is what `merge_splits` writes. A kernel of its own takes longer than attention over a few pages, most of it until it
runs. Programs that share a result count themselves when their part lies in memory, and the one that counts last merges,
alone: for few heads and parts only. It sets the count back to zero for the next launch, so that graphs replay.

Source: the last block of a grid finishes the reduction: threadFenceReduction of the CUDA samples; the merge:
FlashDecoding. Cost: reads every part once, from the cache; bound by its latency.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ragkit.kernels.backend import ceil_div, jit, next_power_of_2, tl

MOST_ROUNDS = 5  # of loads that one program waits for; with more, `merge_splits` is faster. 0 always has it merge.
_HEADS = 4  # that are merged at once
_NUMBERS = 2048  # of a head's parts that are loaded in one round, 64 registers a thread of four warps
_RING = 1 << 20  # counters of a device, 4 MB
_MOST_COUNTERS = _RING >> 8  # of a launch
_ALIGNED = 4  # counters in 16 bytes


def merges_at_end(heads: int, splits: int, head_dim: int) -> bool:
    """Return whether the last program should merge.

    Args:
        heads: results of each program, counted over tokens.
        splits: parts of each.
        head_dim: numbers of a part.
    """
    at_once = max(1, _NUMBERS // next_power_of_2(head_dim))
    return ceil_div(heads, _HEADS) * ceil_div(splits, at_once) <= MOST_ROUNDS


def end_counters(number: int, device: torch.device) -> Tensor | None:
    """Return (number,) int32, all zero, for one launch that leaves them zero; None where there are none to have.

    They come from a ring, and were used by a launch that lies hundreds of launches back: launches on two streams
    do not meet in them. A stream that is captured before anything was launched on the device gets none.
    """
    if number > _MOST_COUNTERS:
        return None
    with _taking:
        ring = _rings.get(device)
        if ring is None:
            # What is allocated while a stream is captured belongs to the graph.
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None
            ring = _rings[device] = _Ring(device)
        return ring.take(number)


class _Ring:
    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._counters = torch.zeros(_RING, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams take from it, too
        self._next = 0

    def take(self, number: int) -> Tensor:
        first = self._next if self._next + number <= _RING else 0
        self._next = first + ceil_div(number, _ALIGNED) * _ALIGNED
        return self._counters[first : first + number]


_rings: dict[torch.device, _Ring] = {}
_taking = threading.Lock()


@jit
def merge_at_end(
    partial_ptr, weight_ptr, out_ptr, counter_ptr, first, count, stride, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """Write the attention over all parts of some heads, if this program is the last of `splits` to come here.

    Args:
        partial_ptr, weight_ptr: (heads, splits, HEAD_DIM) and (heads, splits) fp32, where each program stored its own.
        out_ptr: (heads, HEAD_DIM)
        counter_ptr: of these programs, zero before the first and after the last.
        first, count, stride: head i of `count` is `first + i // GROUP * stride + i % GROUP`.
        splits: parts, one a program.
        DIM_PADDED: a power of two, from HEAD_DIM on.
    """
    HEADS: tl.constexpr = 4
    SPLITS: tl.constexpr = 2048 // DIM_PADDED
    tl.debug_barrier()  # this program counts when all its threads have stored
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == splits - 1:
        tl.store(counter_ptr, 0)
        dim = tl.arange(0, DIM_PADDED)
        for behind in tl.range(0, count, HEADS, num_stages=1):
            index = behind + tl.arange(0, HEADS)
            head = first + (index // GROUP * stride + index % GROUP)
            is_head = index < count
            highest = tl.full((HEADS,), float("-inf"), tl.float32)
            total = tl.zeros((HEADS,), tl.float32)
            summed = tl.zeros((HEADS, DIM_PADDED), tl.float32)
            for first_split in tl.range(0, splits, SPLITS, num_stages=1):
                split = first_split + tl.arange(0, SPLITS)
                part = head[None, :] * splits + split[:, None]
                mask = (split < splits)[:, None] & is_head[None, :]
                # Other processors wrote them: from the cache that all share, not from this processor's own.
                weight = tl.load(weight_ptr + part, mask=mask, other=float("-inf"), cache_modifier=".cg")
                partial = tl.load(
                    partial_ptr + part[:, :, None] * HEAD_DIM + dim[None, None, :],
                    mask=mask[:, :, None] & (dim < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg",
                )  # fmt: skip
                new_highest = tl.maximum(highest, tl.max(weight, axis=0))
                # While nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
                base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
                share, shrink = tl.exp2(weight - base[None, :]), tl.exp2(highest - base)
                total = total * shrink + tl.sum(share, axis=0)
                summed = summed * shrink[:, None] + tl.sum(partial * share[:, :, None], axis=0)
                highest = new_highest
            merged = (summed / tl.where(total > 0, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
            out_at = out_ptr + head[:, None] * HEAD_DIM + dim[None, :]
            tl.store(out_at, merged, mask=is_head[:, None] & (dim < HEAD_DIM)[None, :])
