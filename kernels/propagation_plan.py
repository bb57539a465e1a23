"""Which rows of a request were recomputed, and how far each of the others moves with them.

    w_tj = exp(-(t - j)^2 / (2 sigma^2))  for |t - j| <= 4 sigma, else 0;   S_t = sum_j w_tj
    row t moves by  sum_j w_tj / max(1, S_t)  of the changes of the recomputed rows j of its chunk

Source: this project's own method (change propagation): kernel regression (Nadaraya 1964, Watson 1964) of the change on
the distance, shrunk towards no change where S_t < 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.errors import KernelInputError

TILE_ROWS = 64  # rows that one program of the kernel blends
_TORCH_ROWS = 256  # rows that one matrix product of the torch definition moves, at most
_REACH = 4  # sigmas


class SmoothingBlock(NamedTuple):
    """Consecutive rows of one chunk and how the recomputed rows near them move them.

    Attributes:
        rows: which rows.
        entries: which of the recomputed rows, counted over all chunks; it may be empty.
        weights: (rows, entries) fp32, w_tj / max(1, S_t).
    """

    rows: slice
    entries: slice
    weights: Tensor


@dataclass(frozen=True, eq=False)
class PropagationPlan:
    """What all layers of a request share; made by `plan_propagation`.

    Attributes:
        sigma: standard deviation of the smoothing, in tokens.
        reach: largest distance in tokens at which a recomputed row still moves another.
        rows: number of rows of all chunks.
        selected: (n,) int64, the recomputed rows, ascending.
        entry_of_row: (rows,) int32, where a row stands in `selected`, or -1.
        tiles: (tiles, 4) int32: first row, end row, first and end of the entries of `selected` within reach; a tile is
            at most `TILE_ROWS` rows of one chunk, and all tiles cover all rows.
        block_bounds: the same of larger tiles for the torch definition, on the host.
    """

    sigma: float
    reach: int
    rows: int
    selected: Tensor
    entry_of_row: Tensor
    tiles: Tensor
    block_bounds: tuple[tuple[int, int, int, int], ...]

    @cached_property
    def blocks(self) -> tuple[SmoothingBlock, ...]:
        """The weights as the torch definition multiplies them."""
        return tuple(self._block(*bounds) for bounds in self.block_bounds)

    def _block(self, first: int, end: int, first_entry: int, end_entry: int) -> SmoothingBlock:
        row = torch.arange(first, end, device=self.selected.device)
        distance = (row[:, None] - self.selected[None, first_entry:end_entry]).float()
        weights = (distance.square() * (-0.5 / self.sigma**2)).exp_()
        weights.masked_fill_(distance.abs() > self.reach, 0.0)
        weights /= weights.sum(dim=1, keepdim=True).clamp_min_(1.0)
        return SmoothingBlock(slice(first, end), slice(first_entry, end_entry), weights)


def plan_propagation(selected: Tensor, cu_rows: Tensor, cu_selected: Tensor, sigma: float) -> PropagationPlan:
    """Return the plan of one request, for all of its layers.

    Chunk c owns the rows cu_rows[c] to cu_rows[c + 1], of which selected[cu_selected[c] : cu_selected[c + 1]] were
    recomputed. The host waits for the three tensors once if they are on a GPU.

    Args:
        selected: (n,) integers, ascending; the plan lies on its device.
        cu_rows, cu_selected: (chunks + 1,) integers, on any device.
        sigma: standard deviation of the smoothing, in tokens, at least 0.25.

    Raises:
        KernelInputError: the indices contradict each other.
    """
    if selected.dim() != 1 or cu_rows.dim() != 1 or cu_rows.shape != cu_selected.shape or len(cu_rows) == 0:
        raise KernelInputError(
            "selected must be (n,), cu_rows and cu_selected (chunks + 1,), got "
            f"{tuple(selected.shape)}, {tuple(cu_rows.shape)}, {tuple(cu_selected.shape)}"
        )
    if not sigma >= 0.25:
        raise KernelInputError(f"sigma must be at least 0.25 tokens, got {sigma}")
    chosen, starts, entries = selected.cpu().long(), cu_rows.cpu().long(), cu_selected.cpu().long()
    _check_indices(chosen, starts, entries)
    device, rows, reach = selected.device, int(starts[-1]), int(_REACH * sigma)
    entry_of_row = torch.full((rows,), -1, dtype=torch.int32)
    entry_of_row[chosen] = torch.arange(len(chosen), dtype=torch.int32)
    return PropagationPlan(
        sigma=sigma,
        reach=reach,
        rows=rows,
        selected=chosen.to(device),
        entry_of_row=entry_of_row.to(device),
        tiles=_tiles(chosen, starts, entries, reach, TILE_ROWS).int().to(device),
        block_bounds=tuple(map(tuple, _tiles(chosen, starts, entries, reach, _TORCH_ROWS).tolist())),
    )


def _check_indices(selected: Tensor, cu_rows: Tensor, cu_selected: Tensor) -> None:
    if int(cu_rows[0]) != 0 or bool((cu_rows.diff() < 0).any()):
        raise KernelInputError(f"cu_rows must rise from 0, got {cu_rows.tolist()}")
    rows = int(cu_rows[-1])
    if len(selected) and (bool((selected.diff() <= 0).any()) or int(selected[0]) < 0 or int(selected[-1]) >= rows):
        raise KernelInputError(f"selected must be ascending rows from 0 to {rows - 1}")
    if not torch.equal(torch.searchsorted(selected, cu_rows), cu_selected):
        raise KernelInputError(f"cu_selected must count the selected rows of each chunk, got {cu_selected.tolist()}")


def _tiles(selected: Tensor, cu_rows: Tensor, cu_selected: Tensor, reach: int, rows: int) -> Tensor:
    """Return (tiles, 4) int64 of at most `rows` rows, as `PropagationPlan.tiles`."""
    chunks = zip(cu_rows.tolist(), cu_rows[1:].tolist(), cu_selected.tolist(), cu_selected[1:].tolist(), strict=False)
    bounds = [
        (first, min(first + rows, end), first_entry, end_entry)
        for start, end, first_entry, end_entry in chunks
        for first in range(start, end, rows)
    ]
    tiles = torch.tensor(bounds, dtype=torch.int64).view(-1, 4)
    nearest = torch.searchsorted(selected, tiles[:, 0] - reach)
    furthest = torch.searchsorted(selected, tiles[:, 1] + reach)
    tiles[:, 2] = tiles[:, 2].maximum(nearest)
    tiles[:, 3] = tiles[:, 3].minimum(furthest).maximum(tiles[:, 2])
    return tiles
