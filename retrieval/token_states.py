"""Batches of sequences by length, and the states of their tokens brought back into order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ragkit.retrieval.base import IdVector

if TYPE_CHECKING:
    from torch import Tensor


def states_in_order(
    windows: Sequence[IdVector],
    forward: Callable[[NDArray[np.int64], NDArray[np.int64]], Tensor],
    batch_tokens: int,
    on_tokens: Callable[[int], None] | None = None,
) -> Tensor:
    """Return (tokens, dim): what `forward` gives for packed ids and lengths, batch by batch, in the windows' order."""
    import torch

    lengths = np.fromiter(map(len, windows), dtype=np.int64, count=len(windows))
    starts = np.cumsum(lengths) - lengths
    parts: list[Tensor] = []
    places: list[NDArray[np.int64]] = []
    for rows in batches(lengths, batch_tokens):
        parts.append(forward(np.concatenate([windows[row] for row in rows]), lengths[rows]))
        places.append(np.concatenate([np.arange(starts[row], starts[row] + lengths[row]) for row in rows]))
        if on_tokens is not None:
            on_tokens(int(lengths[rows].sum()))
    order = np.concatenate(places)
    if (np.diff(order) == 1).all():
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    states = torch.empty((len(order), parts[0].shape[1]), dtype=parts[0].dtype, device=parts[0].device)
    states[torch.from_numpy(order).to(states.device)] = torch.cat(parts)
    return states


def batches(lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Yield rows from the longest to the shortest, at most `batch_tokens` tokens together (one row at least)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        ends = np.cumsum(lengths[order[start:]])
        count = max(1, int(np.searchsorted(ends, batch_tokens, side="right")))
        yield order[start : start + count]
        start += count
