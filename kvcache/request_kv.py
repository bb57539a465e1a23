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
from ragkit.kernels.paged_rows import FIELD_ROWS, HIDDEN
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_field import RequestField
from ragkit.kvcache.request_table import Replaced, RequestTable


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of several requests behind each other.

    Attributes:
        slots: (rows,) int64, rows of the pool counted over blocks.
        positions: (rows,) int64, ascending within a request.
        cu_seqlens: (requests + 1,) int32: request i has the rows from `cu_seqlens[i]` up to `cu_seqlens[i + 1]`.
        cells: (rows,) int64, where each row stands in its request's table, counted in `FIELD_ROWS` rows.
    """

    slots: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    cells: Tensor

    def to(self, device: torch.device) -> PackedRows:
        """Return the same on a device."""
        return PackedRows(*(part.to(device) for part in (self.slots, self.positions, self.cu_seqlens, self.cells)))


class RequestKV:
    """The KV of one request: a block table, and the true position of every row of its blocks.

    Three kinds of blocks appear in the table. Shared blocks hold a chunk's rows and belong to many requests; they
    are never written here. Private blocks before them and behind them, the tail, hold the prompt's own rows and what
    is generated. Private replacement blocks hold recomputed rows, whose originals in shared blocks are hidden. The
    table's tensors live on the CPU; who needs them elsewhere copies them, and sees by `version` when to do so again.

    Attributes:
        pool: where the rows are.
        block_ids: block of each table entry.
        num_tokens: rows are written for the positions 0 to `num_tokens` - 1.
        version: grows whenever the table changes.
        field: what is added to the rows of its entries, or None.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.block_ids: list[int] = []
        self.num_tokens = 0
        self.version = 0
        self.field: RequestField | None = None
        self._positions = torch.empty((0, pool.block_size), dtype=torch.int32)
        self._is_shared: list[bool] = []
        self._tail: list[int] = []  # entries of the private tail, ascending in position
        self._tail_start = 0  # position of the first row of the tail
        self._spare = torch.empty(0, dtype=torch.int64)  # private rows before the tail not used yet, over entries
        self._unseen: list[Replaced] = []  # what `_positions` does not show yet

    @property
    def row_positions(self) -> Tensor:
        """(entries, block_size) int32: the true position of each row, `HIDDEN` where no query may look."""
        self._look_at_unseen()
        return self._positions

    @property
    def num_reserved(self) -> int:
        """Positions that have a row, written or not."""
        return self._tail_start + len(self._tail) * self.pool.block_size

    @property
    def private_bytes(self) -> int:
        """Bytes that this request alone takes: its private blocks in all layers, and its field."""
        blocks = self._is_shared.count(False)
        rows = blocks * self.pool.block_size * self.pool.layout.bytes_per_token
        return rows + (0 if self.field is None else self.field.nbytes)

    def append_private(self, num_rows: int) -> None:
        """Allocate private blocks for the next `num_rows` positions, which shared blocks may follow.

        Raises:
            CacheCapacityError: the pool has too few free blocks; the request is unchanged then.
            KVCacheError: rows behind the shared ones are reserved already.
        """
        self._require_no_tail()
        blocks = self.pool.allocate(self.pool.blocks_for(num_rows))
        first = len(self.block_ids) * self.pool.block_size
        self._append(blocks, self._ascending(self.num_tokens, num_rows), shared=False)
        end = len(self.block_ids) * self.pool.block_size
        self._spare = torch.cat((self._spare, torch.arange(first + num_rows, end)))
        self.num_tokens += num_rows
        self._tail_start = self.num_tokens

    def append_shared(self, block_ids: Sequence[int], num_rows: int) -> None:
        """List the blocks of a cached chunk of `num_rows` tokens at the next positions, and hold them.

        Raises:
            KVCacheError: rows behind the shared ones are reserved already, or the number of blocks does not fit.
        """
        self._require_no_tail()
        if len(block_ids) != self.pool.blocks_for(num_rows):
            raise KVCacheError(f"{num_rows} rows take {self.pool.blocks_for(num_rows)} blocks, got {len(block_ids)}")
        self.pool.retain(block_ids)
        self._append(block_ids, self._ascending(self.num_tokens, num_rows), shared=True)
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

    def give_back(self, num_tokens: int) -> int:
        """Free the blocks that hold rows of positions from `num_tokens` on alone; return how many.

        Rows that are written are never among them, nor blocks that others stand behind in the table.
        """
        size, before = self.pool.block_size, len(self.block_ids)
        kept = max(num_tokens, self.num_tokens)
        while self._tail[-1:] == [len(self.block_ids) - 1] and self.num_reserved - size >= kept:
            self._tail.pop()
            self.pool.release([self.block_ids.pop()])
        count = len(self.block_ids)
        if count < before:
            self._positions = self._positions[:count]
            del self._is_shared[count:]
            self.version += 1
        return before - count

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
        self._look_at_unseen()
        place = self._places()
        if len(positions.unique()) != len(positions) or bool((place[positions.clamp(max=len(place) - 1)] < 0).any()):
            raise KVCacheError(f"rows can be replaced at distinct positions below {self.num_reserved} only")
        size = self.pool.block_size
        moved = torch.tensor(self._is_shared)[place[positions] // size]
        fresh = self._take_spare(int(moved.sum()))
        self._move(positions[moved], fresh, place)
        place[positions[moved]] = fresh
        self.version += 1
        return self.slots_at(place[positions])

    def replace_unseen(self, positions: Tensor) -> Tensor:
        """Return (rows,) int64 on the host, what `replace` does, for positions that the host does not look at yet.

        The caller answers for them: distinct, and of rows that are shared. They may lie on a GPU, which nobody waits
        for until the table is asked for on the host.

        Raises:
            CacheCapacityError: the pool has too few free blocks; the request is unchanged then.
        """
        fresh = self._take_spare(len(positions))
        self._unseen.append(Replaced(positions, fresh))
        self.version += 1
        return self.slots_at(fresh)

    def places(self) -> Tensor:
        """Return (num_reserved,) int64: the row over entries that stands at each position.

        At positions that `replace_unseen` got, that is the replaced row until the table is asked for on the host.
        """
        return self._places()[:-1]

    def slots_at(self, places: Tensor) -> Tensor:
        """Return (rows,) int64, the rows of the pool for (rows,) int64 rows over entries, both on the host."""
        size = self.pool.block_size
        return torch.tensor(self.block_ids, dtype=torch.int64)[places // size] * size + places % size

    def on_device(self) -> RequestTable:
        """Return the table on the pool's device; the host does not wait for it."""
        return RequestTable.of(self.block_ids, self._positions, self.places(), self._unseen, self.pool.device)

    def rows(self, layer: int, packed: PackedRows) -> LayerKV:
        """Return copies of this request's keys and values (rows, kv_heads, head_dim), with its field added.

        Args:
            layer: which layer.
            packed: what `pack_rows` gave for this request alone, on the pool's device.
        """
        keys, values = self.pool.rows(layer, packed.slots)
        return (keys, values) if self.field is None else self.field.added(layer, keys, values, packed.cells)

    def release(self) -> None:
        """Give every block back; the request is empty afterwards. Releasing twice is harmless."""
        blocks, self.block_ids = self.block_ids, []
        self._positions = self._positions[:0]
        self._is_shared, self._tail = [], []
        self.num_tokens = self._tail_start = 0
        self._spare, self._unseen, self.field = self._spare[:0], [], None
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

    def _move(self, positions: Tensor, fresh: Tensor, place: Tensor) -> None:
        # Both on the host: the rows over entries that stood at the positions hide, and fresh ones stand there.
        rows = self._positions.flatten()
        rows[place[positions]] = HIDDEN
        rows[fresh] = positions.to(torch.int32)

    def _look_at_unseen(self) -> None:
        unseen, self._unseen = self._unseen, []
        for part in unseen:
            self._move(part.positions.cpu(), part.rows, self._places())

    def _require_no_tail(self) -> None:
        if self._tail:
            raise KVCacheError("shared blocks come before the request's own rows, which are reserved already")

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
    slots, positions, cells, lengths = [], [], [], [0]
    for request in requests:
        at = request.row_positions.flatten().long()
        blocks = torch.tensor(request.block_ids, dtype=torch.int64).repeat_interleave(request.pool.block_size)
        rows = blocks * request.pool.block_size + torch.arange(len(at)) % request.pool.block_size
        written = at < request.num_tokens
        order = at[written].argsort()
        slots.append(rows[written][order])
        positions.append(at[written][order])
        cells.append(written.nonzero().squeeze(1)[order] // FIELD_ROWS)
        lengths.append(int(written.sum()))
    cu_seqlens = torch.tensor(lengths).cumsum(0).to(torch.int32)
    empty = torch.empty(0, dtype=torch.int64)
    return PackedRows(
        torch.cat([empty, *slots]), torch.cat([empty, *positions]), cu_seqlens, torch.cat([empty, *cells])
    )
