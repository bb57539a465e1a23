"""What selectors may measure of the tokens that a layer has just projected: against reused rows, and among chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ragkit.generation.decoder import Projected
from ragkit.kernels.chunk_attention import chunk_attention
from ragkit.kernels.kv_deviation import kv_deviation
from ragkit.kvcache.codec import LayerKV
from ragkit.kvcache.rope import RotaryTable, rotate
from ragkit.kvcache.token_selection import ChunkAttention, Deviation


class ProjectedRows:
    """The `FreshRows` of one layer. Holds only while the projected heads are un-rotated.

    Args:
        projected: what the layer gives attention; its first rows are those of `chosen`.
        chosen: (tokens,) int64 ascending positions in chunks.
        reused: gives the layer's reused keys (before RoPE) and values of all positions.
        cu_rows: the first chunk's start, and where each chunk stops.
        rotary: the request's rotary table.
        scale: factor on attention scores.
    """

    def __init__(
        self,
        projected: Projected,
        chosen: Tensor,
        reused: Callable[[], LayerKV],
        cu_rows: Sequence[int],
        rotary: RotaryTable,
        scale: float,
    ) -> None:
        self._queries, self._keys, self._values = (part[: len(chosen)] for part in projected[:3])
        self._chosen = chosen
        self._reused = reused
        self._cu_rows = cu_rows
        self._rotary = rotary
        self._scale = scale

    def deviation(self) -> Deviation:
        """Return the distances of fresh keys and values to the reused ones."""
        keys, values = self._reused()
        return Deviation(*kv_deviation(self._keys, self._values, keys[self._chosen], values[self._chosen]))

    def chunk_attention(self) -> ChunkAttention:
        """Return the attention of the chosen tokens; of the other tokens, the reused keys are attended to."""
        reused, _ = self._reused()
        keys = reused[: self._cu_rows[-1]].clone()
        keys[self._chosen] = self._keys
        rotated = rotate(keys, self._rotary.cos[: len(keys)], self._rotary.sin[: len(keys)])
        queries = self._rotary.rotate(self._queries, self._chosen)
        return ChunkAttention(*chunk_attention(queries, rotated, self._chosen, self._cu_rows, scale=self._scale))
