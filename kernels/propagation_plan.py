"""Which rows of a request were recomputed, and how far each of the others moves with them.

    w_tj = exp(-(t - j)^2 / (2 sigma^2))  for |t - j| <= 4 sigma, else 0;   S_t = sum_j w_tj
    row t moves by  min(1, S_t) * sum_j v_j w_tj D_j / sum_j v_j w_tj,   D_j: change of a recomputed row j of its chunk

v_j counts the rows of the chunk that j is the nearest recomputed one of, half of those between two neighbours each.
Rows that a question looks at come in clusters and do not change as the others do; without v a cluster would outvote
the evenly spaced rows around it.

Source: this project's own method (change propagation): kernel regression (Nadaraya 1964, Watson 1964) of the change on
the distance, shrunk towards no change where S_t < 1; points weighed by the gap that they fill, Priestley and Chao 1972.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.host_copy import to_device
from ragkit.kernels.propagation_shares import propagation_shares

TILE_ROWS = 64  # rows that one program of the kernel blends
_TORCH_ROWS = 256  # rows that one matrix product of the torch definition moves, at most
_REACH = 4  # sigmas


class SmoothingBlock(NamedTuple):
    """Consecutive rows of one chunk and how the recomputed rows near them move them.

    Attributes:
        rows: which rows.
        entries: which of the recomputed rows, counted over all chunks; it may be empty.
        weights: (rows, entries) fp32, min(1, S_t) v_j w_tj / sum_j v_j w_tj.
    """

    rows: slice
    entries: slice
    weights: Tensor


@dataclass(frozen=True, eq=False)
class PropagationPlan:
    """What all layers of a request share; made by `plan_propagation` or `ChunkTiles.plan`.

    Attributes:
        sigma: standard deviation of the smoothing, in tokens.
        reach: largest distance in tokens at which a recomputed row still moves another.
        rows: number of rows of all chunks.
        selected: (n,) int64, the recomputed rows, ascending.
        stands_for: (n,) fp32, v_j of each, at least 1 and at most twice the reach.
        entry_of_row: (rows,) int32, where a row stands in `selected`, or -1.
        tiles: (tiles, 4) int32: first row, end row, first and end of the entries of `selected` within reach; a tile is
            at most `TILE_ROWS` rows of one chunk, and all tiles cover all rows.
        cu_rows: where the chunks start, and the last one ends.
    """

    sigma: float
    reach: int
    rows: int
    selected: Tensor
    stands_for: Tensor
    entry_of_row: Tensor
    tiles: Tensor
    cu_rows: tuple[int, ...]

    @cached_property
    def shares(self) -> Tensor:
        """(rows,) fp32: min(1, S_t) / sum_j v_j w_tj of each row, 0 of a recomputed one."""
        return propagation_shares(
            self.selected, self.stands_for, self.tiles,
            rows=self.rows, tile_rows=TILE_ROWS, sigma=self.sigma, reach=self.reach,
        )  # fmt: skip

    @cached_property
    def voices(self) -> Tensor:
        """(n,) fp32, the base-2 logarithm of v_j: kernels add it where they would have to multiply."""
        return self.stands_for.log2()

    @cached_property
    def blocks(self) -> tuple[SmoothingBlock, ...]:
        """The weights as the torch definition multiplies them, in larger tiles; a GPU is waited for."""
        rows, bounds = _cut(self.cu_rows, self.reach, _TORCH_ROWS)
        tiles = torch.cat((rows, torch.searchsorted(self.selected.cpu(), bounds)), dim=1)
        return tuple(self._block(*tile) for tile in tiles.tolist())

    def _block(self, first: int, end: int, first_entry: int, end_entry: int) -> SmoothingBlock:
        row = torch.arange(first, end, device=self.selected.device)
        distance = (row[:, None] - self.selected[None, first_entry:end_entry]).float()
        weights = (distance.square() * (-0.5 / self.sigma**2)).exp_()
        weights.masked_fill_(distance.abs() > self.reach, 0.0)
        share = weights.sum(dim=1, keepdim=True).clamp_max_(1.0)
        weights *= self.stands_for[first_entry:end_entry]
        weights *= share / weights.sum(dim=1, keepdim=True).clamp_min_(1e-30)
        return SmoothingBlock(slice(first, end), slice(first_entry, end_entry), weights)


class ChunkTiles:
    """The rows of one request's chunks cut into tiles: what plans share that differ in the recomputed rows alone.

    Args:
        cu_rows: chunk c owns the rows from `cu_rows[c]` up to `cu_rows[c + 1]`; the first is 0.
        sigma: standard deviation of the smoothing, in tokens, at least 0.25.
        device: where the plans lie.

    Attributes:
        cu_rows: as above.
        cuts: (chunks + 1,) int64, the same on the device.

    Raises:
        KernelInputError: the chunks contradict each other, or sigma is too small.
    """

    def __init__(self, cu_rows: Sequence[int], sigma: float, device: torch.device) -> None:
        if not sigma >= 0.25:
            raise KernelInputError(f"sigma must be at least 0.25 tokens, got {sigma}")
        if not cu_rows or cu_rows[0] != 0 or any(stop < start for start, stop in pairwise(cu_rows)):
            raise KernelInputError(f"cu_rows must rise from 0, got {list(cu_rows)}")
        self.cu_rows = tuple(cu_rows)
        self._sigma = sigma
        self._reach = int(_REACH * sigma)
        rows, bounds = _cut(self.cu_rows, self._reach, TILE_ROWS)
        whole = to_device(torch.cat((rows.flatten(), bounds.flatten(), torch.tensor(self.cu_rows))), device)
        self._rows, self._bounds = whole[: 4 * len(rows)].view(2, -1, 2)
        self.cuts = whole[4 * len(rows) :]

    def plan(self, selected: Tensor) -> PropagationPlan:
        """Return the plan for the recomputed rows `selected` (n,) int64, distinct and ascending, on the device.

        The caller answers for the rows: to look at them would stop a GPU's stream.
        """
        rows = self.cu_rows[-1]
        entry_of_row = torch.full((rows,), -1, dtype=torch.int32, device=selected.device)
        entry_of_row[selected] = torch.arange(len(selected), dtype=torch.int32, device=selected.device)
        tiles = torch.cat((self._rows, torch.searchsorted(selected, self._bounds)), dim=1).int()
        stands_for = self._stands_for(selected)
        return PropagationPlan(self._sigma, self._reach, rows, selected, stands_for, entry_of_row, tiles, self.cu_rows)

    def _stands_for(self, selected: Tensor) -> Tensor:
        """Return (n,) fp32: how many rows lie between the middles of the gaps before and behind each recomputed row."""
        behind = torch.searchsorted(self.cuts, selected, right=True)
        start, stop = self.cuts[behind - 1], self.cuts[behind]
        ends = selected.new_full((1,), -1), selected.new_full((1,), self.cu_rows[-1])
        before, after = torch.cat((ends[0], selected[:-1])), torch.cat((selected[1:], ends[1]))
        # In halves of a row; at a chunk's ends the edge of its outermost row stands in for the middle of a gap.
        left = torch.where(before < start, 2 * start - 1, before + selected)
        right = torch.where(after < stop, after + selected, 2 * stop - 1)
        return ((right - left).float() / 2).clamp_max(2.0 * self._reach)


def plan_propagation(selected: Tensor, cu_rows: Tensor, cu_selected: Tensor, sigma: float) -> PropagationPlan:
    """Return the plan of one request, for all of its layers, after having looked at every index.

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
    tiles = ChunkTiles(cu_rows.tolist(), sigma, selected.device)
    _check_indices(selected.cpu().long(), cu_rows.cpu().long(), cu_selected.cpu().long())
    return tiles.plan(selected.long())


def strengths_alike(
    keys: float | Tensor, values: float | Tensor, like: Tensor
) -> tuple[tuple[float, float], tuple[Tensor, Tensor] | None]:
    """Return two strengths as one launch takes them: numbers, or numbers that mean nothing and both by head.

    Args:
        keys, values: a number, or (kv_heads,) fp32.
        like: (..., kv_heads, head_dim), on whose device they are wanted.
    """
    if not isinstance(keys, Tensor) and not isinstance(values, Tensor):
        return (float(keys), float(values)), None
    by_head = [
        one if isinstance(one, Tensor) else torch.full((like.shape[-2],), one, dtype=torch.float32, device=like.device)
        for one in (keys, values)
    ]
    return (1.0, 1.0), (by_head[0], by_head[1])


def _check_indices(selected: Tensor, cu_rows: Tensor, cu_selected: Tensor) -> None:
    rows = int(cu_rows[-1])
    if len(selected) and (bool((selected.diff() <= 0).any()) or int(selected[0]) < 0 or int(selected[-1]) >= rows):
        raise KernelInputError(f"selected must be ascending rows from 0 to {rows - 1}")
    if not torch.equal(torch.searchsorted(selected, cu_rows), cu_selected):
        raise KernelInputError(f"cu_selected must count the selected rows of each chunk, got {cu_selected.tolist()}")


def _cut(cu_rows: Sequence[int], reach: int, size: int) -> tuple[Tensor, Tensor]:
    """Return two (tiles, 2) int64: first and end row of tiles of up to `size` rows, and those within their reach.

    Rows of other chunks are never within reach.
    """
    cuts = np.asarray(cu_rows, dtype=np.int64)
    tiles = -(-np.diff(cuts) // size)  # of each chunk
    start, stop = np.repeat(cuts[:-1], tiles), np.repeat(cuts[1:], tiles)
    before = np.repeat(np.cumsum(tiles) - tiles, tiles)  # tiles of the chunks before
    first = start + (np.arange(len(start)) - before) * size
    end = np.minimum(first + size, stop)
    rows = np.stack((first, end), axis=1)
    bounds = np.stack((np.maximum(first - reach, start), np.minimum(end + reach, stop)), axis=1)
    return torch.from_numpy(rows), torch.from_numpy(bounds)
