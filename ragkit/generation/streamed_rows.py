"""Reused rows on a GPU: placed layer by layer while what follows is still being copied, or gathered from the pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.generation.decoder import Decoder
from ragkit.generation.reused_rows import BlendLayout, RowSource, unwritten_layer
from ragkit.kernels.host_copy import to_device
from ragkit.kvcache.chunk_kv import EncodedKV
from ragkit.kvcache.codec import KVCodec, LayerKV
from ragkit.kvcache.copy_queue import CopyQueue
from ragkit.kvcache.encoded_rows import EncodedRows, StoredRows
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.pool_tier import PinnedBlocks, PoolCandidate, PoolTier

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class PooledRows:
    """Rows of chunks that lie in blocks of the pool.

    Attributes:
        pool: where they lie.
        slots: (rows,) int64 on the device: for each of the prompt's rows from `first` on, its row of the pool; any one
            where another source writes the row afterwards.
        first: the first of these rows.
    """

    pool: KVPool
    slots: Tensor
    first: int

    @classmethod
    def of(cls, chunks: Sequence[tuple[PinnedBlocks, int]], first: int, stop: int) -> PooledRows:
        """Return the rows of `chunks`, each with the row of its first token, among those from `first` up to `stop`."""
        pool = chunks[0][0].pool
        rows = pool.rows_of([block for blocks, _ in chunks for block in blocks.block_ids]).numpy()
        slots = np.zeros(stop - first, dtype=np.int64)
        taken = 0
        for blocks, start in chunks:
            count = blocks.num_tokens
            slots[start - first : start - first + count] = rows[taken : taken + count]
            taken += len(blocks.block_ids) * pool.block_size
        return cls(pool, to_device(torch.from_numpy(slots), pool.device), first)

    def place(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the rows of one layer into `keys` and `values`: two launches, however many chunks there are."""
        there = slice(self.first, self.first + len(self.slots))
        torch.index_select(self.pool.keys[layer].flatten(0, 1), 0, self.slots, out=keys[there])
        torch.index_select(self.pool.values[layer].flatten(0, 1), 0, self.slots, out=values[there])


class StreamedRows:
    """The `RowSource` whose layers are made when they are asked for, in one buffer that all layers share.

    Args:
        decoder: the model.
        num_tokens: positions of the prompt.
        prefix: keys and values of the first positions, a pair a layer.
        pooled: the chunks in the pool.
        encoded: all other chunks.
        draft: what tokens are chosen by; these rows themselves unless given.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_tokens: int,
        prefix: Sequence[LayerKV],
        pooled: PooledRows | None,
        encoded: EncodedRows | None,
        draft: RowSource | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self._draft = draft
        self._decoder = decoder
        self._prefix = prefix
        self._pooled = pooled
        self._encoded = encoded
        self._buffer: LayerKV | None = None
        self._places: list[Tensor] | None = None  # of the prefix in the buffer
        self._in_pool: tuple[Tensor, Tensor] | None = (
            None  # slots that were asked for, and where the rows lie with them
        )
        self._holds = -1

    @property
    def draft(self) -> RowSource:
        """The rows that tokens are chosen by."""
        return self._draft or self

    def layer(self, index: int) -> LayerKV:
        """Return keys and values of a layer, as `RowSource` says."""
        if self._buffer is None:
            self._buffer = unwritten_layer(self._decoder, index, self.num_tokens)
            count = len(self._prefix[index][0])
            self._places = [part[:count] for part in self._buffer] if count else None
        if self._holds != index:
            if self._places is not None:
                torch._foreach_copy_(self._places, list(self._prefix[index]))  # keys and values at once
            if self._pooled is not None:
                self._pooled.place(index, *self._buffer)
            if self._encoded is not None:
                self._encoded.place(index, *self._buffer)
            self._holds = index
        return self._buffer

    def stored(self, index: int, pool: KVPool | None, slots: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a layer where it lies, as `RowSource` says: in the pool, if all chunks do."""
        chunks = self._pooled
        if chunks is None or self._encoded is not None or chunks.pool is not pool:
            return *self.layer(index), None
        if self._in_pool is None or self._in_pool[0] is not slots:  # a request may get other rows than it began with
            self._in_pool = slots, torch.cat((slots[: chunks.first], chunks.slots))
        return pool.keys[index].flatten(0, 1), pool.values[index].flatten(0, 1), self._in_pool[1]


class StreamedChunks:
    """The chunks of one request on their way to the GPU.

    Args:
        decoder: the model.
        layout: the prompt.
        prefix: keys and values of the prompt's first tokens, a pair a layer.
        chunks: as they were fetched, in the order of the prompt; host memory must stay until their copies are done.
        codec: what encoded them.

    Attributes:
        queue: the copies, begun already.
    """

    def __init__(
        self,
        decoder: Decoder,
        layout: BlendLayout,
        prefix: Sequence[LayerKV],
        chunks: Sequence[EncodedKV | PinnedBlocks],
        codec: KVCodec,
    ) -> None:
        self.queue = CopyQueue(decoder.device)
        self._decoder = decoder
        self._layout = layout
        self._prefix = prefix
        self._placed = list(zip(chunks, (span.start for span in layout.spans(first_is_exact=False)), strict=True))
        self._drafts: EncodedRows | None = None
        self._encoded: EncodedRows | None = None
        if codec.draft is not None:  # before the rest, which arrives while tokens are recomputed
            drafts = [_stored_draft(chunk, row) for chunk, row in self._placed]
            self._drafts = EncodedRows(drafts, codec.draft, self.queue, decoder.device)
        stored = [
            StoredRows(chunk.data, chunk.extents, row, chunk.num_tokens)
            for chunk, row in self._placed
            if isinstance(chunk, EncodedKV)
        ]
        if stored:
            self._encoded = EncodedRows(stored, codec, self.queue, decoder.device)
        for rows in (self._drafts, self._encoded):
            if rows is not None:
                rows.prepare()
        self.queue.start()

    @property
    def came_from_host(self) -> bool:
        """Whether any of the chunks did."""
        return self._encoded is not None

    def rows(self) -> StreamedRows:
        """Return their rows."""
        layout, draft = self._layout, None
        if self._drafts is not None:
            draft = StreamedRows(self._decoder, layout.num_tokens, self._prefix, None, self._drafts)
        in_pool = [(chunk, row) for chunk, row in self._placed if isinstance(chunk, PinnedBlocks)]
        pooled = PooledRows.of(in_pool, layout.first, layout.stop) if in_pool else None
        return StreamedRows(self._decoder, layout.num_tokens, self._prefix, pooled, self._encoded, draft)

    def tokens_are_chosen(self) -> None:
        """Let the chunks go before what nobody asked for of their drafts: its upper layers, or all of it."""
        if self._drafts is not None:
            self._drafts.postpone()

    def add_to(self, tier: PoolTier) -> None:
        """Add the chunks that came from host memory to the pool where it has room, in the order of the stream."""
        if self._encoded is not None:
            _add(tier, self._encoded, self._drafts, self._placed)

    def keep(self, tier: PoolTier) -> None:
        """Add the chunks that came from host memory to the pool where it has room, and let go of all others' bytes.

        The first token is out and the chunks are in host memory: where a GPU has no memory for this, it is left undone.
        """
        encoded, drafts, placed = self._encoded, self._drafts, self._placed
        self._encoded, self._drafts, self._placed = None, None, []
        if encoded is None:
            return
        _add(tier, encoded, drafts, placed)
        # Drafts that nobody had asked for are copied only now. Nobody holds their chunks but this request, so their
        # page-locked memory would be given to others below the copies.
        self.queue.finish()


def _add(
    tier: PoolTier,
    encoded: EncodedRows,
    drafts: EncodedRows | None,
    placed: Sequence[tuple[EncodedKV | PinnedBlocks, int]],
) -> None:
    candidates = [
        _candidate(chunk, drafts, index) for index, (chunk, _) in enumerate(placed) if isinstance(chunk, EncodedKV)
    ]
    try:
        tier.add_all(candidates, lambda kept, slots: encoded.place_into_pool(tier.pool, kept, slots))
    except torch.OutOfMemoryError as error:
        _log.warning("%d chunks are not kept in the tier %s: %s", len(candidates), tier.name, error)


def _candidate(chunk: EncodedKV, drafts: EncodedRows | None, index: int) -> PoolCandidate:
    if drafts is None:
        return PoolCandidate(chunk.ref, chunk.recompute_ms)
    return PoolCandidate(chunk.ref, chunk.recompute_ms, partial(drafts.bytes_of, index), drafts.size_of(index))


def _stored_draft(chunk: EncodedKV | PinnedBlocks, row: int) -> StoredRows:
    if isinstance(chunk, EncodedKV):
        return StoredRows(chunk.data, chunk.draft_extents, row, chunk.num_tokens)
    if chunk.draft is None:
        raise KVCacheError("a chunk in the pool has no draft although the codec keeps one")
    return StoredRows(chunk.draft.data, chunk.draft.extents, row, chunk.num_tokens)
