"""A request's block table as paged attention takes it, on a device; the host need not know which rows were replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.kernels.host_copy import to_device
from ragkit.kernels.paged_rows import HIDDEN


class Replaced(NamedTuple):
    """Rows that stand in the place of others.

    Attributes:
        positions: (rows,) int64, on any device.
        rows: (rows,) int64 on the host: the rows over entries that stand there now.
    """

    positions: Tensor
    rows: Tensor


class RequestTable(NamedTuple):
    """The table of one request.

    Attributes:
        block_tables: (1, entries) int32, the block of each entry.
        row_positions: (1, entries, block_size) int32, the true position of each row, or `HIDDEN`.
        num_entries: (1,) int32.
    """

    block_tables: Tensor
    row_positions: Tensor
    num_entries: Tensor

    @classmethod
    def of(
        cls, block_ids: Sequence[int], row_positions: Tensor, places: Tensor, replaced: Sequence[Replaced],
        device: torch.device,
    ) -> RequestTable:  # fmt: skip
        """Return the table on `device`; the host does not wait for it.

        Args:
            block_ids: block of each entry.
            row_positions: (entries, block_size) int32 on the host, before rows were replaced.
            places: (positions,) int64 on the host: the row over entries that stands at each position there.
            replaced: what changed since, at positions on the device.
            device: where the table is wanted.
        """
        head = torch.tensor([*block_ids, len(block_ids)], dtype=torch.int32)
        head = to_device(head, device)
        positions = to_device(row_positions, device).clone()
        if replaced:
            flat, at = positions.flatten(), to_device(places, device)
            for part in replaced:
                flat.index_fill_(0, at[part.positions], HIDDEN)
                flat.index_copy_(0, to_device(part.rows, device), part.positions.to(torch.int32))
        return cls(head[None, :-1].contiguous(), positions.unsqueeze(0), head[-1:])
