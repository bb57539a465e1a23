"""How much of the smoothed change to apply, by the evidence of the request itself.

Every recomputed row is predicted from the other recomputed rows of its chunk by the same smoothing that moves the rest
(leave one out). Where such predictions hold, all of the smoothed change is applied; where they are noise, none:

    strength_h = <P, D>_h / <P, P>_h, within [0, 1]     D: changes of the recomputed rows, P: their predictions, head h

Source: this project's own method; shrinkage of a predictor by its cross-validated slope, van Houwelingen and le Cessie
(Statistics in Medicine 9, 1990).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_FEWEST = 8  # recomputed rows; below, all of the change is applied


class ChangeStrength:
    """Strengths for the layers of one request.

    Args:
        selected: (n,) int64 ascending rows that were recomputed.
        cu_selected: which of them belong to which chunk, as `plan_propagation` takes it, on the host.
        sigma: standard deviation of the smoothing in tokens.
        stands_for: (n,) fp32, how many rows each of them speaks for (`PropagationPlan`); one each unless given.
    """

    def __init__(
        self, selected: Tensor, cu_selected: Sequence[int], sigma: float, stands_for: Tensor | None = None
    ) -> None:
        counts = [stop - start for start, stop in itertools.pairwise(cu_selected)]
        self._count = len(selected)
        self._width = max(counts, default=0)
        # Chunks are padded to the same number of recomputed rows: one matrix product a layer serves all of them.
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
        place = torch.arange(self._count) - torch.tensor(list(cu_selected), dtype=torch.int64)[owner]
        self._places = (owner * self._width + place).to(selected.device)
        self._chunks = len(counts)
        rows = selected.new_zeros(self._chunks * self._width)
        rows[self._places] = selected
        there = torch.zeros(self._chunks * self._width, dtype=torch.bool, device=selected.device)
        there[self._places] = True
        rows, there = rows.view(self._chunks, self._width), there.view(self._chunks, self._width)
        distance = (rows[:, :, None] - rows[:, None, :]).float()
        weights = (distance.square() * (-0.5 / sigma**2)).exp()
        weights *= there[:, :, None] & there[:, None, :]
        weights.diagonal(dim1=1, dim2=2).zero_()
        share = weights.sum(dim=2, keepdim=True).clamp_max(1.0)
        if stands_for is not None:
            padded = stands_for.new_zeros(self._chunks * self._width)
            padded[self._places] = stands_for
            weights *= padded.view(self._chunks, 1, self._width)
        self._weights = weights * (share / weights.sum(dim=2, keepdim=True).clamp_min(1e-30))

    def of(self, change: Tensor) -> Tensor:
        """Return (heads,) fp32 from 0 to 1.

        Args:
            change: (n, heads, head_dim), fresh minus reused rows.
        """
        heads = change.shape[1]
        if self._count < _FEWEST:
            return torch.ones(heads, dtype=torch.float32, device=change.device)
        change = change.float()
        padded = change.new_zeros(self._chunks * self._width, change[0].numel())
        padded[self._places] = change.flatten(1)
        predicted = torch.bmm(self._weights, padded.view(self._chunks, self._width, -1)).flatten(0, 1)
        predicted = predicted[self._places].view(change.shape)
        explained = (predicted * change).sum(dim=(0, 2))
        return (explained / predicted.square().sum(dim=(0, 2)).clamp_min(1e-30)).clamp(0.0, 1.0)
