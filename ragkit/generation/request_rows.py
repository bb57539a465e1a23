"""Where the rows of one blended request go: shared ones if they are wanted and there is room, else private ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.config import BlendRows
from ragkit.errors import CacheCapacityError
from ragkit.generation.blend_pass import BlendInputs, Propagation, RowTarget
from ragkit.generation.prefix_rows import write_prefix
from ragkit.generation.private_rows import RowSink
from ragkit.generation.reused_rows import BlendLayout
from ragkit.generation.shared_chunks import list_chunks
from ragkit.generation.shared_rows import SharedRows, shared_slots
from ragkit.generation.strategy import PrefillRequest
from ragkit.generation.streamed_rows import StreamedChunks
from ragkit.kvcache.chunk_kv import ChunkRef, EncodedKV
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.pool_tier import PinnedBlocks, PoolTier
from ragkit.kvcache.token_selection import ChunkSpan


class RequestRows:
    """The rows of one request. `settle` is called once its chunks are found, and `target` once its tokens are chosen.

    Private rows are reserved at once: before the chunks are pinned, some of which may have to leave the pool for them,
    and before the chunks' KV is copied, behind which small copies would wait.

    Args:
        request: whose rows are empty.
        prefix: keys and values of the prompt's first tokens, a pair a layer; written once there are rows.
        spans: where its chunks stand.
        propagation: how the change of recomputed tokens moves the others.
        wanted: which rows are configured.

    Attributes:
        are_shared: whether the request lists its chunks where they lie in the pool.
        refusal: why rows are private that were to be shared, or nothing.

    Raises:
        CacheCapacityError: the pool has too few free blocks for private rows.
    """

    def __init__(
        self,
        request: PrefillRequest,
        prefix: Sequence[LayerKV],
        spans: Sequence[ChunkSpan],
        propagation: Propagation,
        wanted: BlendRows,
    ) -> None:
        self._request = request
        self._prefix = prefix
        self._spans = spans
        self._propagation = propagation
        self.are_shared = False
        self._inputs = self._private() if wanted is BlendRows.PRIVATE else None
        self.refusal = ""

    def settle(
        self,
        layout: BlendLayout,
        refs: Sequence[ChunkRef],
        chunks: Sequence[EncodedKV | PinnedBlocks],
        streamed: StreamedChunks | None,
        tier: PoolTier | None,
    ) -> BlendInputs:
        """Return what the blend needs beside KV, with a row for every position.

        Args:
            layout: the prompt.
            refs: its chunks in order.
            chunks: as they were fetched, still pinned.
            streamed: the same on their way to the pool's device, if they are not there yet.
            tier: where chunks lie in the request's pool.

        Raises:
            CacheCapacityError: the pool has too few free blocks for private rows as well.
        """
        if self._inputs is None:
            if tier is None or streamed is None:
                self.refusal = "there is no tier in the pool, which kv.gpu_mb sizes"
            else:
                self.refusal = list_chunks(self._request, layout, refs, chunks, streamed, tier)
            self.are_shared = not self.refusal
            self._inputs = self._shared() if self.are_shared else self._private()
        return self._inputs

    def target(self, chosen: Tensor) -> RowTarget:
        """Return where the pass writes: private rows also where the recomputed ones find no room beside shared ones.

        Args:
            chosen: (tokens,) int64 ascending positions that the pass computes from its first layer on.

        Raises:
            CacheCapacityError: the pool has too few free blocks for private rows as well.
        """
        inputs, kv = self._inputs, self._request.kv
        assert inputs is not None, "`settle` is called before"
        if self.are_shared:
            try:
                return SharedRows(kv, inputs, chosen, self._propagation)
            except (CacheCapacityError, torch.OutOfMemoryError) as error:
                kv.release()
                self.refusal, self.are_shared = str(error), False
                self._inputs = inputs = self._private()
        return RowSink.into(kv.pool, inputs.slots)

    def _private(self) -> BlendInputs:
        request = self._request
        request.kv.reserve(len(request.prompt))
        return self._inputs_over(request.kv.slots(0, len(request.prompt)))

    def _shared(self) -> BlendInputs:
        return self._inputs_over(shared_slots(self._request.kv, len(self._request.prompt)))

    def _inputs_over(self, slots: Tensor) -> BlendInputs:
        write_prefix(self._request.kv.pool, slots[: self._spans[0].start], self._prefix)
        return BlendInputs.of(self._request, self._spans, self._propagation.sigma, slots)
