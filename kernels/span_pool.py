# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""Mean of the token states in each of many spans, brought to length one.

    mean_s = sum_{t = start_s}^{stop_s - 1} state_t / (stop_s - start_s),   out_s = mean_s / max(|mean_s|, 1e-12)

Source: late chunking, arXiv 2409.04701, section 3 (mean pooling of each chunk's tokens). Spans may overlap and be
empty; an empty one gives zeros. Cost: reads each span's states once; bandwidth bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, next_power_of_2, resolve_backend, tl
from ragkit.kernels.launched import launched

LEAST_NORM = 1e-12
_TILE = 8192  # elements that one program loads at once
_WIDEST = 8192  # channels that one program can sum


def span_pool(
    states: Tensor, starts: Tensor, stops: Tensor, *, normalise: bool = True, backend: Backend | None = None
) -> Tensor:
    """Return (spans, dim) fp32, summed in fp32: unit rows, or plain means where `normalise` is False.

    Args:
        states: (tokens, dim), channels contiguous, tokens at any stride.
        starts, stops: (spans,) int64 on the device of `states`: half-open ranges of tokens.
        normalise: bring each mean to length one; what is shorter than 1e-12 stays that short.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes or types do not fit.
    """
    _check_inputs(states, starts, stops)
    if resolve_backend(states, backend) is Backend.TORCH:
        return span_pool_torch(states, starts, stops, normalise=normalise)
    spans, dim = len(starts), states.shape[1]
    out = torch.empty((spans, dim), dtype=torch.float32, device=states.device)
    if out.numel() == 0:
        return out
    columns = next_power_of_2(dim)
    if columns > _WIDEST:
        raise KernelInputError(
            f"span_pool sums at most {_WIDEST} channels in Triton, got {dim}: ask for backend='torch'"
        )
    rows = max(1, _TILE // columns)
    _span_pool_kernel[(spans,)](
        states, starts.contiguous(), stops.contiguous(), out, dim, states.stride(0), LEAST_NORM,
        NORMALISE=normalise, ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return out


def span_pool_torch(states: Tensor, starts: Tensor, stops: Tensor, *, normalise: bool = True) -> Tensor:
    """Return what `span_pool` returns: the definition."""
    lengths = (stops - starts).clamp(min=0)
    out = torch.zeros((len(starts), states.shape[1]), dtype=torch.float32, device=states.device)
    owner = torch.repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    token = torch.arange(len(owner), device=states.device) - first[owner] + starts[owner]
    out.index_add_(0, owner, states[token].float())
    out /= lengths.clamp(min=1).unsqueeze(1)
    return out / out.norm(dim=1, keepdim=True).clamp(min=LEAST_NORM) if normalise else out


def _check_inputs(states: Tensor, starts: Tensor, stops: Tensor) -> None:
    if states.dim() != 2 or (states.numel() and states.stride(1) != 1):
        raise KernelInputError(
            f"states must be (tokens, dim) with contiguous rows, got {tuple(states.shape)}, strides {states.stride()}"
        )
    for name, ends in (("starts", starts), ("stops", stops)):
        if ends.dim() != 1 or ends.dtype != torch.int64 or ends.shape != starts.shape:
            raise KernelInputError(f"{name} must be (spans,) int64, got {tuple(ends.shape)} {ends.dtype}")
        if ends.device != states.device:
            raise KernelInputError(f"{name} must be on {states.device} like states, got {ends.device}")


@launched(do_not_specialize=("stride_st",))
def _span_pool_kernel(
    states_ptr, starts_ptr, stops_ptr, out_ptr, dim, stride_st, least_norm,
    NORMALISE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # This program pools one span.
    span = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + span)
    stop = tl.load(stops_ptr + span)
    column = tl.arange(0, COLUMNS)
    inside = column < dim
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & inside[None, :]
        tile = tl.load(states_ptr + row[:, None] * stride_st + column[None, :], mask=mask, other=0.0)
        total += tile.to(tl.float32)
    mean = tl.sum(total, axis=0) / tl.maximum(stop - start, 1).to(tl.float32)
    if NORMALISE:
        norm = tl.sqrt(tl.sum(mean * mean, axis=0))
        mean = mean / tl.maximum(norm, least_norm)
    tl.store(out_ptr + span * dim + column, mean, mask=inside)
