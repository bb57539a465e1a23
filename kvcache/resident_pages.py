"""A whole document's pages on a GPU, encoded as they are stored: attention finds them without asking the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kernels.dequantize_kv import dequantize_kv
from ragkit.kernels.paged_rows import Blocks
from ragkit.kernels.quantize_kv import QuantizedHeads, quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kvcache.page_codec import NOT_FINITE, PageCodec
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.quantized_pool import QuantizedPool


class ComingPages(NamedTuple):
    """Pages that are placed while only the device knows which they are: the same ones in every layer.

    Attributes:
        pages: (pages,) int64 on the device.
        groups: where the groups of their keys and those of their values go, as `QuantizedPool.group_slots` says.
    """

    pages: Tensor
    groups: tuple[Tensor, Tensor]


class ResidentPages:
    """Pools in which block i is page i of the document, in every layer.

    Args:
        codec: how pages are encoded.
        num_pages: pages of the document.
        device: where the model runs.

    Attributes:
        nbytes: what the pools take.
    """

    def __init__(self, codec: PageCodec, num_pages: int, device: torch.device) -> None:
        self._codec = codec
        self._pool: KVPool | QuantizedPool
        if codec.bits:
            self._pool = QuantizedPool(
                codec.layout, num_pages, device, bits=codec.bits, group=codec.group, block_size=codec.page_size
            )
        else:
            self._pool = KVPool(codec.layout, num_pages, device, codec.page_size)
        self.nbytes = sum(part.nbytes for part in (*self._pool.keys, *self._pool.values))
        self._groups = torch.empty(0, dtype=torch.int64, device=device)

    def write(self, layer: int, pages: range, keys: Tensor, values: Tensor) -> Tensor:
        """Encode rows (tokens, kv_heads, head_dim) into `pages`, and return the keys as `keys` does.

        Nothing waits for the device, so numbers that cannot be encoded are not noticed: see `require_finite`.
        """
        for rows, blocks in ((keys, self._pool.keys[layer]), (values, self._pool.values[layer])):
            filled = self._codec.filled(rows)
            if isinstance(blocks, QuantizedBlocks):
                target = _part(blocks, pages)
                quantize_kv(
                    filled, bits=blocks.bits, token_group=blocks.row_group, channel_group=blocks.channel_group,
                    out=target, slots=self._first_groups(len(target.scale)),
                )  # fmt: skip
            else:
                blocks[pages.start : pages.stop].copy_(filled.view(len(pages), self._codec.page_size, *rows.shape[1:]))
        return self.keys(layer, pages)

    def coming(self, pages: Tensor) -> ComingPages:
        """Return where the rows of `pages` (pages,) int64 go, of which only the device needs to know which they are."""
        assert isinstance(self._pool, QuantizedPool), "of a quantised pool"
        return ComingPages(pages, self._pool.group_slots(pages, len(pages) * self._codec.page_size))

    def place(self, layer: int, coming: ComingPages, keys: Tensor, values: Tensor) -> None:
        """Encode rows (tokens, kv_heads, head_dim), keys before RoPE, into whole pages that `coming` gave."""
        assert isinstance(self._pool, QuantizedPool), "of a quantised pool"
        self._pool.write_groups(layer, coming.groups, keys, values)

    def parts(self, layer: int, pages: Tensor) -> list[Tensor]:
        """Return copies of codes, scales and zeros (pages, ...) of the keys and of the values of `pages` (pages,)."""
        sides = []
        for blocks in self.blocks(layer):
            assert isinstance(blocks, QuantizedBlocks), "of a quantised pool"
            sides.append(blocks.some(pages))
        return [part for side in sides for part in (side.codes, side.scales, side.zeros)]

    def put(self, layer: int, first: int, data: Tensor) -> None:
        """Place encoded pages (pages, page_bytes) uint8 of a layer from page `first` on."""
        data = data.to(self._pool.device, non_blocking=True)
        pages = slice(first, first + len(data))
        blocks = (self._pool.keys[layer], self._pool.values[layer])
        if isinstance(self._pool, QuantizedPool):
            for target, codes in zip(blocks, self._codec.codes(layer, data), strict=True):
                assert isinstance(target, QuantizedBlocks), "of a quantised pool"
                for part, own in zip((target.codes, target.scales, target.zeros), codes, strict=True):
                    part[pages].copy_(own.view(part[pages].shape))
        else:
            for rows, decoded in zip(blocks, self._codec.decode(layer, data), strict=True):
                assert isinstance(rows, Tensor), "of a pool of numbers"
                rows[pages].copy_(decoded)

    def put_windows(self, first: int, data: Tensor, extents: Sequence[tuple[int, int]]) -> None:
        """Place neighbouring windows of as many pages each from page `first` on.

        Args:
            first: the first page.
            data: (windows, bytes) uint8 on the device.
            extents: start and stop of each layer within a row.
        """
        for layer, (start, stop) in enumerate(extents):
            self.put(layer, first, data[:, start:stop].reshape(-1, self._codec.page_bytes(layer)))

    def keys(self, layer: int, pages: range) -> Tensor:
        """Return the keys (pages, page_size, kv_heads, head_dim) of `pages`, in the model's type."""
        blocks = self._pool.keys[layer]
        if isinstance(blocks, Tensor):
            return blocks[pages.start : pages.stop]
        _, page_size, kv_heads, head_dim = blocks.shape
        out = torch.empty(
            (len(pages) * page_size, kv_heads, head_dim), dtype=self._codec.layout.dtype, device=self._pool.device
        )
        dequantize_kv(_part(blocks, pages), out, token_group=blocks.row_group)
        return out.view(len(pages), page_size, kv_heads, head_dim)

    def blocks(self, layer: int) -> tuple[Blocks, Blocks]:
        """Return the keys' and the values' blocks of a layer."""
        return self._pool.keys[layer], self._pool.values[layer]

    def require_finite(self, pages: range) -> None:
        """Raise `KVCacheError` where rows of `pages` could not be encoded; waits for the device.

        A value that is no number makes its token's scales none, and so does one beyond what fp16 scales carry.
        """
        if isinstance(self._pool, KVPool) or not pages:
            return
        sides = [*self._pool.keys, *self._pool.values]
        parts = [part[pages.start : pages.stop] for side in sides for part in (side.scales, side.zeros)]
        finite = torch.stack([part.isfinite().all() for part in parts])
        if not bool(finite.all()):
            raise KVCacheError(NOT_FINITE)

    def _first_groups(self, count: int) -> Tensor:
        if len(self._groups) < count:
            self._groups = torch.arange(count, device=self._pool.device)
        return self._groups[:count]


def _part(blocks: QuantizedBlocks, pages: range) -> QuantizedHeads:
    """Return a view of some blocks behind each other."""
    parts = (blocks.codes, blocks.scales, blocks.zeros)
    return QuantizedHeads(*(part[pages.start : pages.stop].flatten(0, 1) for part in parts))
