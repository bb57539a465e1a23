"""The stored KV of a prompt's chunks on its way to a device, and the packed rows that it gives there.

The encoded bytes of all chunks go behind each other into one buffer, a few layers at a time; what a layer needs is
waited for when it is asked for, so loading the next layers goes on below computing this one. Placing a layer is one
launch (`place_chunks`), however many chunks there are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ragkit.kernels.place_chunks import place_chunks
from ragkit.kernels.placement_table import PlacementTable
from ragkit.kvcache.chunk_kv import LAYER_ALIGNMENT
from ragkit.kvcache.codec import KVCodec
from ragkit.kvcache.copy_queue import CopyQueue
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.pool_tier import DraftBytes

_COPY_BYTES = 2_200_000  # of one copy: much smaller ones spend their time on starting


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """One chunk of a prompt as it is stored.

    Attributes:
        data: (bytes,) uint8, on the host or on the device.
        extents: start and stop in `data` of each layer, ascending.
        first_row: the row of its first token.
        tokens: number of tokens.
    """

    data: Tensor
    extents: Sequence[tuple[int, int]]
    first_row: int
    tokens: int


class EncodedRows:
    """Some chunks of one prompt in one encoding. Copies begin when the queue is started, in the order of the layers.

    Args:
        chunks: at least one.
        codec: what encoded them.
        queue: brings the bytes; several encodings come one after the other in the order in which they are made.
        device: where the rows are wanted.
    """

    def __init__(self, chunks: Sequence[StoredRows], codec: KVCodec, queue: CopyQueue, device: torch.device) -> None:
        self._chunks = tuple(chunks)
        self._codec = codec
        self._queue = queue
        self._device = device
        # On the device chunks stand behind each other, each with its extents counted from its first byte.
        self._firsts = [chunk.extents[0][0] for chunk in self._chunks]
        sizes = [chunk.extents[-1][1] - first for chunk, first in zip(self._chunks, self._firsts, strict=True)]
        self._bases = [0, *itertools.accumulate(_aligned(size) for size in sizes)]
        self._bytes = torch.empty(self._bases[-1], dtype=torch.uint8, device=device)
        if queue.stream is not None:
            self._bytes.record_stream(queue.stream)
        num_layers = codec.layout.num_layers
        self._job_of_layer: list[int] = []
        for start, stop in _groups(num_layers, sum(sizes) / len(sizes) / num_layers, self._are_on_device()):
            job = queue.add(functools.partial(self._bring, start, stop))
            self._job_of_layer += [job] * (stop - start)

    def place(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the chunks' rows of one layer into `keys` and `values` (rows, kv_heads, head_dim), once they are here.

        Args:
            layer: index of the layer.
            keys, values: contiguous, in the model's type, on the device; all other rows are left alone.
        """
        self._queue.wait(self._job_of_layer[layer])
        place_chunks(self._bytes, self._table, layer, self._codec.format(layer), keys, values)

    def place_into_pool(self, pool: KVPool, which: Sequence[int], slots: Tensor) -> None:
        """Write all layers of the chunks `which` into a pool.

        Args:
            pool: on the same device.
            which: indices of chunks.
            slots: (rows,) int64, rows of the pool counted over blocks, for their tokens behind each other.
        """
        self._queue.wait(self._job_of_layer[-1])
        tokens = [self._chunks[index].tokens for index in which]
        table = self._table_of(which, [0, *itertools.accumulate(tokens)][:-1])
        for layer in range(self._codec.layout.num_layers):
            keys, values = pool.keys[layer].flatten(0, 1), pool.values[layer].flatten(0, 1)
            place_chunks(self._bytes, table, layer, self._codec.format(layer), keys, values, slots)

    def size_of(self, index: int) -> int:
        """Return how many bytes `bytes_of` gives."""
        return self._bases[index + 1] - self._bases[index]

    def bytes_of(self, index: int) -> DraftBytes:
        """Return a copy of the bytes of one chunk on the device."""
        self._queue.wait(self._job_of_layer[-1])
        first = self._firsts[index]
        extents = tuple((start - first, stop - first) for start, stop in self._chunks[index].extents)
        return DraftBytes(self._bytes[self._bases[index] : self._bases[index + 1]].clone(), extents)

    def prepare(self) -> None:
        """Send to the device what says where each chunk's bytes are, before any copy, behind which it would wait."""
        self._table  # noqa: B018 (made at the first look)

    def postpone(self) -> None:
        """Let the copies of other encodings go before what was not begun of this one."""
        self._queue.postpone(self._job_of_layer)

    def _bring(self, start: int, stop: int) -> None:
        """Bring the layers from `start` up to `stop` of all chunks."""
        for chunk, base, first in zip(self._chunks, self._bases, self._firsts, strict=False):
            begin, end = chunk.extents[start][0], chunk.extents[stop - 1][1]
            self._bytes[base + begin - first : base + end - first].copy_(chunk.data[begin:end], non_blocking=True)

    @functools.cached_property
    def _table(self) -> PlacementTable:
        return self._table_of(range(len(self._chunks)), [chunk.first_row for chunk in self._chunks])

    def _table_of(self, which: Sequence[int], first_rows: Sequence[int]) -> PlacementTable:
        # By numpy: torch wakes all cores for so few numbers, and a GPU waits for them.
        num_layers = self._codec.layout.num_layers
        extents = np.array([self._chunks[index].extents for index in which], dtype=np.int64).reshape(-1, num_layers, 2)
        moved = np.array([self._bases[index] - self._firsts[index] for index in which], dtype=np.int64)
        tokens = [self._chunks[index].tokens for index in which]
        starts = torch.from_numpy(extents[:, :, 0].T + moved)
        return PlacementTable.build(first_rows, tokens, starts, self._device)

    def _are_on_device(self) -> bool:
        return self._device.type != "cpu" and all(chunk.data.device == self._device for chunk in self._chunks)


def _groups(num_layers: int, layer_bytes: float, at_once: bool) -> list[tuple[int, int]]:
    """Return which layers are copied together: all, or one first, then twice as many until copies are large."""
    groups, start, size = [], 0, num_layers if at_once else 1
    while start < num_layers:
        stop = min(start + size, num_layers)
        groups.append((start, stop))
        start = stop
        if size * layer_bytes < _COPY_BYTES:
            size *= 2
    return groups


def _aligned(count: int) -> int:
    return -(-count // LAYER_ALIGNMENT) * LAYER_ALIGNMENT
