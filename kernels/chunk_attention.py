"""How much attention the tokens of chunks pay to earlier chunks and to their own.

    w_ts = sum of softmax_j(scale * q_t . k_j) over the heads and the rows j <= t of chunk s
    inter_t = sum_{s < c} w_ts,   density_t = sum_{s < c} w_ts / |s|,   intra_t = w_tc   for token t of chunk c

The weights are an attention's output where the values are the rows' chunks, one channel a chunk: what computes
attention computes them, and no matrix of weights is ever stored. A head has fewer channels than a prompt may have
chunks, so chunks go in groups, each token's query once, with its own group; the chunks of all groups before share two
channels, one that adds up their weights and one that adds them up over the chunks' sizes.

Source: the inter- and intra-attention of Cache-Craft, arXiv 2502.15734, equations 3, 4, 9 and 10; attention to
indicators: this project.
Cost: one attention of the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ragkit.errors import KernelInputError
from ragkit.kernels.backend import Backend
from ragkit.kernels.host_copy import to_device
from ragkit.kernels.selected_attention import selected_attention

_SHARED = 2  # channels that the chunks of all groups before take


def chunk_attention(
    queries: Tensor,
    keys: Tensor,
    positions: Tensor,
    cu_rows: Sequence[int],
    *,
    scale: float,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(inter, density, intra)`, each (tokens,) fp32, exact to the precision of the inputs' type.

    Rows before the first chunk take their part of the softmax and count for none of the three.

    Args:
        queries: (tokens, q_heads, head_dim), rotated; heads of a token contiguous, tokens at any stride.
        keys: (rows, kv_heads, head_dim), contiguous, rotated; row j stands at position j.
        positions: (tokens,) int64, ascending, each in a chunk.
        cu_rows: chunk c holds the rows from `cu_rows[c]` up to `cu_rows[c + 1]`, the last of which is `rows`.
        scale: factor on the scores, above zero.
        backend: an implementation of attention to insist on.

    Raises:
        KernelInputError: shapes do not fit, or the boundaries of the chunks do not ascend to the last row.
    """
    _check_inputs(keys, positions, cu_rows)
    tokens, head_dim = len(queries), queries.shape[2]
    inter, density, intra = torch.empty((3, tokens), dtype=torch.float32, device=queries.device).unbind()
    in_group = head_dim - _SHARED
    bounds = to_device(torch.tensor(cu_rows), keys.device)
    firsts = range(0, len(cu_rows) - 1, in_group)
    cuts = [0, tokens]  # where each group's tokens begin
    if len(firsts) > 1:
        cuts = [*torch.searchsorted(positions, bounds[:-1:in_group].contiguous()).tolist(), tokens]
    for first, (start, stop) in zip(firsts, pairwise(cuts), strict=True):
        if start == stop:
            continue
        behind = min(first + in_group, len(cu_rows) - 1)
        seen = cu_rows[behind]  # no query of this group sees a row behind it
        values, sizes = _indicators(keys[:seen], bounds[: behind + 1], first)
        at = positions[start:stop]
        weights = selected_attention(
            queries[start:stop], keys[:seen], values, at.to(torch.int32), scale=scale, backend=backend
        ).sum(dim=1, dtype=torch.float32)
        own = (torch.searchsorted(bounds, at, right=True) - 1 - first + _SHARED).unsqueeze(1)
        intra[start:stop] = weights.gather(1, own).squeeze(1)
        # Left out rather than subtracted: beside its own weight a token's weight for others may be lost to rounding.
        weights.scatter_(1, own, 0.0)
        inter[start:stop] = weights[:, 0] + weights[:, _SHARED:].sum(dim=1)
        density[start:stop] = (weights[:, 1:] / sizes[1:]).sum(dim=1)
    return inter, density, intra


def _indicators(keys: Tensor, bounds: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return values like `keys` that say which chunk a row is of, and (head_dim,) the size that a channel stands for.

    Args:
        keys: (rows, kv_heads, head_dim), up to the group's last row.
        bounds: (chunks + 1,) int64, boundaries of the group's chunks and of all before.
        first: the group's first chunk; chunks before it share channels.
    """
    rows, _, head_dim = keys.shape
    lengths = bounds.diff().clamp_min(1).float()
    mean = lengths.mean()
    row = torch.arange(rows, device=keys.device)
    chunk = torch.searchsorted(bounds, row, right=True) - 1
    in_chunk = (chunk >= 0).float()  # the prompt's prefix is in none
    before = in_chunk * (chunk < first)
    channels = torch.zeros((rows, head_dim), device=keys.device)
    channel = torch.where(chunk < first, 0, chunk - first + _SHARED)
    channels.scatter_(1, channel.unsqueeze(1), in_chunk.unsqueeze(1))
    channels[:, 1] = before * mean / lengths[chunk.clamp_min(0)]  # near 1, where every type is precise
    sizes = torch.ones(head_dim, device=keys.device)
    sizes[1] = mean
    sizes[_SHARED : _SHARED + len(lengths) - first] = lengths[first:]
    return channels.to(keys.dtype).unsqueeze(1).expand(keys.shape).contiguous(), sizes


def _check_inputs(keys: Tensor, positions: Tensor, cu_rows: Sequence[int]) -> None:
    ascending = all(start <= stop for start, stop in pairwise(cu_rows))
    if len(cu_rows) < 2 or cu_rows[0] < 0 or not ascending or cu_rows[-1] != len(keys):
        raise KernelInputError(f"cu_rows must ascend to the {len(keys)} rows of keys, got {list(cu_rows)}")
    if keys.shape[2] <= _SHARED:
        raise KernelInputError(f"heads must have more than {_SHARED} channels, got {keys.shape[2]}")
    if len(positions) and positions.device.type == "cpu" and int(positions[0]) < cu_rows[0]:
        raise KernelInputError(f"positions must lie in chunks, from {cu_rows[0]} up, got {int(positions[0])}")
