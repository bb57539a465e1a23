# ruff: noqa: ANN001, ANN202 (Triton reads the annotations of kernels, and pointers have none)
# mypy: disable-error-code="no-untyped-def"
"""What part of the recomputed rows' weighed change moves each row: the same for all layers and heads of a request.

    share_t = min(1, S_t) / sum_j v_j w_tj,   0 for rows that were recomputed     (see propagation_plan for v, w and S)

Every layer and head would find the same two sums; found once, a kernel that moves rows only multiplies by them.

Source: this project's own method (change propagation). Cost: an exponent for each row and recomputed row in its reach.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend, resolve_backend, tl
from ragkit.kernels.launched import launched

_LEAST = 1e-30  # a row that no recomputed one is near to has no share


def propagation_shares(
    selected: Tensor,
    stands_for: Tensor,
    tiles: Tensor,
    *,
    rows: int,
    tile_rows: int,
    sigma: float,
    reach: int,
    backend: Backend | None = None,
) -> Tensor:
    """Return (rows,) fp32, the share of each row.

    Args:
        selected: (n,) int64, the recomputed rows, ascending.
        stands_for: (n,) fp32, v_j of each.
        tiles: (tiles, 4) int32, as in `PropagationPlan`; they cover all rows.
        rows: how many there are.
        tile_rows: most rows of a tile, a power of two.
        sigma: standard deviation of the smoothing, in tokens.
        reach: largest distance at which a recomputed row still moves another.
        backend: an implementation to insist on.

    Raises:
        KernelInputError: shapes do not fit.
    """
    if selected.dim() != 1 or stands_for.shape != selected.shape or tiles.dim() != 2 or tiles.shape[1] != 4:
        raise KernelInputError(
            "selected and stands_for must be (n,), tiles (tiles, 4), got "
            f"{tuple(selected.shape)}, {tuple(stands_for.shape)}, {tuple(tiles.shape)}"
        )
    if resolve_backend(selected, backend) is Backend.TORCH:
        return propagation_shares_torch(selected, stands_for, tiles, rows=rows, sigma=sigma, reach=reach)
    shares = torch.zeros(rows, dtype=torch.float32, device=selected.device)
    if len(tiles):
        exponent = -0.5 * 1.4426950408889634 / sigma**2  # the kernel works with powers of two
        _propagation_shares_kernel[(len(tiles),)](
            selected, stands_for, tiles, shares, exponent, reach, ROWS=tile_rows, ENTRIES=32, num_warps=4,
        )  # fmt: skip
        shares.index_fill_(0, selected, 0.0)  # an assignment would have the host wait for a GPU
    return shares


def propagation_shares_torch(
    selected: Tensor, stands_for: Tensor, tiles: Tensor, *, rows: int, sigma: float, reach: int
) -> Tensor:
    """Return what `propagation_shares` returns: the definition, tile after tile."""
    shares = torch.zeros(rows, dtype=torch.float32, device=selected.device)
    for first, end, first_entry, end_entry in tiles.tolist():
        row = torch.arange(first, end, device=selected.device)
        distance = (row[:, None] - selected[None, first_entry:end_entry]).float()
        weights = (distance.square() * (-0.5 / sigma**2)).exp().masked_fill(distance.abs() > reach, 0.0)
        total = (weights * stands_for[first_entry:end_entry]).sum(1)
        shares[first:end] = weights.sum(1).clamp_max(1.0) / total.clamp_min(_LEAST)
    shares.index_fill_(0, selected, 0.0)
    return shares


@launched
def _propagation_shares_kernel(
    selected_ptr, gap_ptr, tile_ptr, share_ptr, exponent, reach, ROWS: tl.constexpr, ENTRIES: tl.constexpr
):
    # This program sums over the recomputed rows that the rows of one tile have in reach.
    tile = tl.program_id(0)
    end_row = tl.load(tile_ptr + tile * 4 + 1)
    first_entry, end_entry = tl.load(tile_ptr + tile * 4 + 2), tl.load(tile_ptr + tile * 4 + 3)
    row = tl.load(tile_ptr + tile * 4) + tl.arange(0, ROWS)
    nearness = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(first_entry, end_entry, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        is_entry = entry < end_entry
        chosen = tl.load(selected_ptr + entry, mask=is_entry, other=0)
        distance = row[:, None] - chosen.to(tl.int32)[None, :]
        near = (tl.abs(distance) <= reach) & is_entry[None, :]
        step = distance.to(tl.float32)
        weight = tl.where(near, tl.exp2(step * step * exponent), 0.0)
        nearness += tl.sum(weight, axis=1)
        total += tl.sum(weight * tl.load(gap_ptr + entry, mask=is_entry, other=0.0)[None, :], axis=1)
    share = tl.minimum(nearness, 1.0) / tl.maximum(total, 1e-30)
    tl.store(share_ptr + row, share, mask=row < end_row)
