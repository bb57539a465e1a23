"""What one request adds to the rows that it shares with others: one vector for every 16 rows, layer by layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kernels.paged_rows import FIELD_ROWS
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.pool import KVPool

FIRST_LAYER = 1  # that has a field: keys and values of layer 0 depend on their token alone


class RequestField:
    """The field of one request, zero until it is written (`change_field`). Attention adds it while it loads rows.

    Args:
        pool: whose blocks the request lists.
        entries: of its block table; entries that it gets later have nothing to add.

    Attributes:
        entries: as above.
        nbytes: bytes that the field takes.

    Raises:
        KVCacheError: blocks cannot be cut into cells of `FIELD_ROWS` rows.
    """

    def __init__(self, pool: KVPool, entries: int) -> None:
        if pool.block_size % FIELD_ROWS:
            raise KVCacheError(f"blocks must hold a multiple of {FIELD_ROWS} rows, got {pool.block_size}")
        self.entries = entries
        shapes = [
            (2, entries, pool.block_size // FIELD_ROWS, spec.num_kv_heads, spec.head_dim)
            for spec in pool.layout.layers[FIRST_LAYER:]
        ]
        # In one run of memory: on a GPU every tensor of zeros is a launch.
        sizes = [math.prod(shape) for shape in shapes]
        whole = torch.zeros(sum(sizes), dtype=pool.layout.dtype, device=pool.device)
        self._layers: list[LayerKV] = []
        for part, shape in zip(whole.split(sizes), shapes, strict=True):
            keys, values = part.view(shape).unbind(0)
            self._layers.append((keys, values))
        self.nbytes = whole.nbytes

    def layer(self, index: int) -> LayerKV | None:
        """Return what is added to keys, before they are rotated, and to values of a layer; None where nothing is.

        Both are (entries, block_size / FIELD_ROWS, kv_heads, head_dim), contiguous, to be written as well.
        """
        return self._layers[index - FIRST_LAYER] if index >= FIRST_LAYER else None

    def parts(self) -> list[Tensor]:
        """Return keys' and values' parts of all layers that have a field, as `layer` gives them."""
        return [part for layer in self._layers for part in layer]

    def of_requests(self, index: int, requests: int) -> tuple[Tensor | None, Tensor | None]:
        """Return keys' and values' part of a layer as paged attention takes it, the entries divided among requests.

        Both are (requests, entries / requests, block_size / FIELD_ROWS, kv_heads, head_dim), or None.
        """
        field = self.layer(index)
        if field is None:
            return None, None
        return field[0].unflatten(0, (requests, -1)), field[1].unflatten(0, (requests, -1))

    def added(self, index: int, keys: Tensor, values: Tensor, cells: Tensor) -> LayerKV:
        """Return rows (rows, kv_heads, head_dim) of a layer with the field added, summed in fp32.

        Args:
            index: which layer.
            keys, values: as they lie in the pool.
            cells: (rows,) int64, where each row stands in the table's entries, counted in `FIELD_ROWS` rows.
        """
        field = self.layer(index)
        if field is None:
            return keys, values
        flat = [part.flatten(0, 1) for part in field]
        inside = (cells < len(flat[0]))[:, None, None]  # rows of later entries stay as they are
        at = cells.clamp(max=len(flat[0]) - 1)
        more_keys, more_values = (torch.where(inside, part[at].float(), 0.0) for part in flat)
        return (keys.float() + more_keys).to(keys.dtype), (values.float() + more_values).to(values.dtype)
