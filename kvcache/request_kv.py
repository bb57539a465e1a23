"""Which rows of the pool one request attends to, and at which positions: the request's whole KV state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kernels.paged_decode_attention import HIDDEN
from ragkit.kvcache.pool import KVPool


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of several requests behind each other.

    Attributes:
        slots: (rows,) int64, rows of the pool counted over blocks.
        positions: (rows,) int64, ascending within a request.
        cu_seqlens: (requests + 1,) int32: request i has the rows from `cu_seqlens[i]` up to `cu_seqlens[i + 1]`.
    """

    slots: Tensor
    positions: Tensor
    cu_seqlens: Tensor


class RequestKV:
    """The KV of one request: a block table, and the true position of every row of its blocks.

    Three kinds of blocks appear in the table. Shared blocks hold a chunk's rows and belong to many requests; they
    are never written here. Private tail blocks hold the prompt's own rows and what is generated. Private
    replacement blocks hold recomputed rows, whose originals in shared blocks are hidden. The table's tensors live
    on the CPU; who needs them elsewhere copies them, and sees by `version` when to do so again.

    Attributes:
        pool: where the rows are.
        block_ids: block of each table entry.
        num_tokens: rows are written for the positions 0 to `num_tokens` - 1.
        version: grows whenever the table changes.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.block_ids: list[int] = []
        self.num_tokens = 0
        self.version = 0
        self._positions = torch.empty((0, pool.block_size), dtype=torch.int32)
        self._is_shared: list[bool] = []
        self._tail: list[int] = []  # entries of the private tail, ascending in position
        self._tail_start = 0  # position of the first row of the tail
        self._spare = torch.empty(0, dtype=torch.int64)  # rows of replacement blocks not used yet, over entries

    @property
    def row_positions(self) -> Tensor:
        """(entries, block_size) int32: the true position of each row, `HIDDEN` where no query may look."""
        return self._positions

    @property
    def num_reserved(self) -> int:
        """Positions that have a row, written or not."""
        return self._tail_start + len(self._tail) * self.pool.block_size

    def append_shared(self, block_ids: Sequence[int], num_rows: int) -> None:
        """List the blocks of a cached chunk of `num_rows` tokens at the next positions, and hold them.

        Raises:
            KVCacheError: the request has private rows already, or the number of blocks does not fit.
        """
        if self._tail:
            raise KVCacheError("shared blocks come before the request's own rows, which are reserved already")
        if len(block_ids) != self.pool.blocks_for(num_rows):
            raise KVCacheError(f"{num_rows} rows take {self.pool.blocks_for(num_rows)} blocks, got {len(block_ids)}")
        self.pool.retain(block_ids)
        for index, block in enumerate(block_ids):
            rows = min(self.pool.block_size, num_rows - index * self.pool.block_size)
            self._append([block], self._ascending(self.num_tokens + index * self.pool.block_size, rows), shared=True)
        self.num_tokens += num_rows
        self._tail_start = self.num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Allocate private blocks until positions 0 to `num_tokens` - 1 all have a row.

        Raises:
            CacheCapacityError: the pool has too few free blocks; the request is unchanged then.
        """
        missing = num_tokens - self.num_reserved
        if missing <= 0:
            return
        blocks = self.pool.allocate(self.pool.blocks_for(missing))
        # Rows ahead of the last token get their position now: causality hides them until they are written.
        positions = self._ascending(self.num_reserved, len(blocks) * self.pool.block_size)
        self._tail += range(len(self.block_ids), len(self.block_ids) + len(blocks))
        self._append(blocks, positions, shared=False)

    def slots(self, start: int, stop: int) -> Tensor:
        """Return (stop - start,) int64, the private tail's rows for the positions from `start` up to `stop`."""
        if not self._tail_start <= start <= stop <= self.num_reserved:
            raise KVCacheError(
                f"positions {start} to {stop} are not in the private rows, which hold {self._tail_start} to "
                f"{self.num_reserved}"
            )
        blocks = [self.block_ids[entry] for entry in self._tail]
        return self.pool.rows_of(blocks)[start - self._tail_start : stop - self._tail_start]

    def slot(self, position: int) -> int:
        """Return the private tail's row for `position`, as `slots` does for many."""
        offset = position - self._tail_start
        if not 0 <= offset < len(self._tail) * self.pool.block_size:
            raise KVCacheError(
                f"no private row is reserved for position {position}; they hold {self._tail_start} to "
                f"{self.num_reserved}"
            )
        entry, row = divmod(offset, self.pool.block_size)
        return self.block_ids[self._tail[entry]] * self.pool.block_size + row

    def replace(self, positions: Tensor) -> Tensor:
        """Return (rows,) int64, private rows for the distinct `positions` (rows,) int64, whose shared originals hide.

        A position that is private already keeps its row. The caller writes the rows of all layers.

        Raises:
            CacheCapacityError: the pool has too few free blocks; the request is unchanged then.
            KVCacheError: a position has no row, or is named twice.
        """
        place = self._places()
        if len(positions.unique()) != len(positions) or bool((place[positions.clamp(max=len(place) - 1)] < 0).any()):
            raise KVCacheError(f"rows can be replaced at distinct positions below {self.num_reserved} only")
        size = self.pool.block_size
        moved = torch.tensor(self._is_shared)[place[positions] // size]
        fresh = self._take_spare(int(moved.sum()))
        rows = self._positions.flatten()
        rows[place[positions[moved]]] = HIDDEN
        rows[fresh] = positions[moved].to(torch.int32)
        place[positions[moved]] = fresh
        self.version += 1
        chosen = place[positions]
        return torch.tensor(self.block_ids)[chosen // size] * size + chosen % size

    def release(self) -> None:
        """Give every block back; the request is empty afterwards. Releasing twice is harmless."""
        blocks, self.block_ids = self.block_ids, []
        self._positions = self._positions[:0]
        self._is_shared, self._tail = [], []
        self.num_tokens = self._tail_start = 0
        self._spare = self._spare[:0]
        self.version += 1
        while blocks:  # a chunk that the prompt holds twice lists its blocks twice, and a call takes each but once
            once = dict.fromkeys(blocks)
            self.pool.release(list(once))
            blocks = [] if len(once) == len(blocks) else _without(blocks, once)

    def __enter__(self) -> RequestKV:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _append(self, blocks: Sequence[int], positions: Tensor, *, shared: bool) -> None:
        self.block_ids += blocks
        self._positions = torch.from_numpy(np.concatenate((self._positions.numpy(), positions.numpy())))
        self._is_shared += [shared] * len(blocks)
        self.version += 1

    def _ascending(self, start: int, rows: int) -> Tensor:
        """Return (blocks, block_size) int32: the positions of `rows` rows from `start` up, then hidden ones."""
        size = self.pool.block_size
        # By numpy: torch wakes all cores for tens of thousands of numbers, which takes longer than to write them.
        positions = np.full(self.pool.blocks_for(rows) * size, HIDDEN, dtype=np.int32)
        positions[:rows] = np.arange(start, start + rows, dtype=np.int32)
        return torch.from_numpy(positions.reshape(-1, size))

    def _places(self) -> Tensor:
        # (num_reserved + 1,): the row over entries that stands at each position, -1 where none does.
        at = self._positions.flatten().long()
        seen = (at != HIDDEN).nonzero().squeeze(1)
        place = torch.full((self.num_reserved + 1,), -1)
        place[at[seen]] = seen
        return place

    def _take_spare(self, count: int) -> Tensor:
        size = self.pool.block_size
        missing = count - len(self._spare)
        if missing > 0:
            blocks = self.pool.allocate(self.pool.blocks_for(missing))
            first = len(self.block_ids) * size
            self._append(blocks, torch.full((len(blocks), size), HIDDEN, dtype=torch.int32), shared=False)
            self._spare = torch.cat((self._spare, torch.arange(first, first + len(blocks) * size)))
        taken, self._spare = self._spare[:count], self._spare[count:]
        return taken


def _without(blocks: Sequence[int], once: Iterable[int]) -> list[int]:
    """Return `blocks` with each of `once` taken out one time."""
    return list((Counter(blocks) - Counter(list(once))).elements())


def pack_rows(requests: Sequence[RequestKV]) -> PackedRows:
    """Return the written rows of `requests`, each in ascending position."""
    slots, positions, lengths = [], [], [0]
    for request in requests:
        at = request.row_positions.flatten().long()
        blocks = torch.tensor(request.block_ids, dtype=torch.int64).repeat_interleave(request.pool.block_size)
        rows = blocks * request.pool.block_size + torch.arange(len(at)) % request.pool.block_size
        written = at < request.num_tokens
        order = at[written].argsort()
        slots.append(rows[written][order])
        positions.append(at[written][order])
        lengths.append(int(written.sum()))
    cu_seqlens = torch.tensor(lengths).cumsum(0).to(torch.int32)
    empty = torch.empty(0, dtype=torch.int64)
    return PackedRows(torch.cat([empty, *slots]), torch.cat([empty, *positions]), cu_seqlens)
