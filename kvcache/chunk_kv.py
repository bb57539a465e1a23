"""The KV of one chunk: as the model computed it, and as a codec stores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ragkit.errors import KVCacheError
from ragkit.kvcache.kv_key import KVKey

LAYER_ALIGNMENT = 64  # bytes; a cache line, and enough for every vector load of a kernel


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """Which KV is meant: its key, the tokens it must be of, and the chunk that it belongs to.

    Attributes:
        key: its identity.
        token_ids: compared with the stored ones on every load, so that a collision of keys is a miss.
        chunk_id: the chunk of the catalogue: the stored KV goes when this chunk goes.
        behind: token ids of its neighbours, which stand between the canonical prefix and the chunk while its KV is
            computed; empty for other contexts.
    """

    key: KVKey
    token_ids: tuple[int, ...] = field(hash=False)  # the key says it already, and in less time
    chunk_id: str
    behind: tuple[int, ...] = field(default=(), compare=False, repr=False)  # of these, too, the key says it


@dataclass(frozen=True, slots=True, eq=False)
class ChunkKV:
    """Keys and values of one chunk, packed without padding.

    Attributes:
        key: its identity.
        token_ids: the tokens, (tokens,).
        layers: keys and values (tokens, kv_heads, head_dim) of each layer; keys are after bias and qk-norm and before
            RoPE, so the chunk can stand at any position.
    """

    key: KVKey
    token_ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]

    def __post_init__(self) -> None:
        for index, (keys, values) in enumerate(self.layers):
            if keys.dim() != 3 or keys.shape[0] != len(self.token_ids) or values.shape != keys.shape:
                raise KVCacheError(
                    f"layer {index} of a chunk of {len(self.token_ids)} tokens has keys {tuple(keys.shape)} and values "
                    f"{tuple(values.shape)}: give (tokens, kv_heads, head_dim) of equal shape, without padding"
                )

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedKV:
    """The KV of one chunk as a codec stores it: what every tier holds, and what a segment's record carries.

    Attributes:
        ref: which KV it is.
        codec_id: the codec that made it.
        data: (bytes,) uint8, the encoded layers behind each other, each at a multiple of `LAYER_ALIGNMENT`; before them
            the layers of the draft, where the codec has one.
        extents: start and stop in `data` of each layer.
        recompute_ms: what computing it took; eviction weighs it.
        draft_extents: start and stop in `data` of each layer of the draft; empty without one.
    """

    ref: ChunkRef
    codec_id: str
    data: Tensor
    extents: tuple[tuple[int, int], ...]
    recompute_ms: float = 0.0
    draft_extents: tuple[tuple[int, int], ...] = ()

    @classmethod
    def pack(
        cls,
        ref: ChunkRef,
        codec_id: str,
        layers: Sequence[Tensor],
        recompute_ms: float = 0.0,
        draft: Sequence[Tensor] = (),
    ) -> EncodedKV:
        """Return the encoded layers of `draft` and then `layers`, (bytes,) uint8 each, in one buffer."""
        parts = [*draft, *layers]
        extents = packed_extents([layer.numel() for layer in parts])
        data = torch.empty(
            extents[-1][1] if extents else 0, dtype=torch.uint8, device=parts[0].device if parts else None
        )
        before = 0
        for layer, (start, stop) in zip(parts, extents, strict=True):
            if before < start:
                data[before:start] = 0  # equal layers give equal records
            copy_bytes(layer, data[start:stop])
            before = stop
        split = len(draft)
        return cls(ref, codec_id, data, extents[split:], recompute_ms, extents[:split])

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.data.numel()

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.ref.token_ids)

    def layer(self, index: int) -> Tensor:
        """Return the encoded bytes of one layer, a view."""
        start, stop = self.extents[index]
        return self.data[start:stop]


def packed_extents(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return start and stop of layers of so many bytes, as `EncodedKV.pack` places them."""
    extents, end = [], 0
    for size in sizes:
        start = -(-end // LAYER_ALIGNMENT) * LAYER_ALIGNMENT
        end = start + size
        extents.append((start, end))
    return tuple(extents)


def copy_bytes(source: Tensor, target: Tensor) -> None:
    """Copy uint8 of the same shape.

    In host memory by numpy: torch wakes all of its threads for it, each thread that copies has as many of its own, and
    a window of two megabytes took 9 ms.
    """
    if source.device.type == target.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)
