"""Attention of a packed pass: every request sees its own rows and those that it lists, nothing else.

On a GPU tokens that decode attend over block tables, all of them in one launch, and pieces of prefills to their own
fresh rows behind what they find in the pool. On a CPU each request keeps a private copy of its rows with rotated keys,
as `contiguous_decode` does: to gather and rotate them from the pool for each token would copy the whole KV every time.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.generation.attention import causal_attention
from ragkit.generation.host_attention import causal_host_attention, one_token_host_attention
from ragkit.generation.packed_pass import PackedPiece, PackedRequest, PackedRowsPlan
from ragkit.kernels.paged_decode_attention import paged_decode_attention
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.rope import RotaryTable, rotate


class DecodeTables(Protocol):
    """The block tables of the requests that decode, on the device."""

    def of(self, requests: list[PackedRequest]) -> tuple[Tensor, Tensor, Tensor]:
        """Return block tables, row positions and numbers of entries, as `paged_decode_attention` takes them."""
        ...


class PackedAttention:
    """The `Attend` of one packed pass. In the last layer it answers for the plan's `wanted` tokens alone.

    Args:
        plan: which tokens.
        pool: where rows are written.
        rotary: the rotary table of all requests.
        scale: factor on the scores.
        last_layer: index of the last layer, above whose keys and values nobody looks at the other tokens.
        tables: block tables of requests that decode; None where requests keep rows of their own.
    """

    def __init__(
        self,
        plan: PackedRowsPlan,
        pool: KVPool,
        rotary: RotaryTable,
        scale: float,
        last_layer: int,
        tables: DecodeTables | None,
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._rotary = rotary
        self._scale = scale
        self._last_layer = last_layer
        self._tables = tables.of(list(plan.decodes)) if tables is not None and plan.decodes else None
        self._turns: tuple[Tensor, Tensor] | None = None
        if plan.pooled is not None:  # torch rotates: angles are looked up once for all layers
            self._turns = rotary.cos[plan.positions], rotary.sin[plan.positions]

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output, as `Attend` says."""
        self._place(layer, queries, keys, values)
        is_last = layer == self._last_layer
        rows = len(self._plan.wanted) if is_last else len(queries)
        out = torch.empty((rows, *queries.shape[1:]), dtype=queries.dtype, device=queries.device)
        count = len(self._plan.decodes)
        if count and self._tables is not None:
            out[:count] = paged_decode_attention(
                queries[:count], self._pool.keys[layer], self._pool.values[layer], *self._tables,
                self._plan.positions[:count], self._rotary.cos, self._rotary.sin, scale=self._scale,
            )  # fmt: skip
        elif count:
            self._decode_own(layer, queries, keys, values, out)
        done = count
        for index, piece in enumerate(self._plan.pieces):
            first, stop = self._plan.bounds[index], self._plan.bounds[index + 1]
            asking = queries[stop - piece.wants_logits : stop] if is_last else queries[first:stop]
            attended = self._attend_piece(index, layer, asking, keys[first:stop], values[first:stop])
            out[done : done + len(asking)] = attended
            done += len(asking)
        return out

    def _place(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write rows into the pool, those of requests apart that keep their own, and rotate queries and keys."""
        plan, pooled = self._plan, self._plan.pooled
        key_pool, value_pool = self._pool.keys[layer], self._pool.values[layer]
        if pooled is None or self._turns is None:
            rope_write_kv(
                queries, keys, values, plan.positions, plan.slots, self._rotary.cos, self._rotary.sin,
                key_pool, value_pool, rotate_keys=True,
            )  # fmt: skip
            return
        if len(pooled):
            slots = plan.slots[pooled]
            key_pool.flatten(0, 1)[slots], value_pool.flatten(0, 1)[slots] = keys[pooled], values[pooled]
        for heads in (queries, keys):
            heads.copy_(rotate(heads, *self._turns))

    def _attend_piece(self, index: int, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        piece, past = self._plan.pieces[index], self._plan.past[index]
        start = self._plan.starts[index]
        if past is not None:
            earlier_keys, earlier_values = piece.request.kv.rows(layer, past)
            keys = torch.cat((self._rotary.rotate(earlier_keys, past.positions), keys))
            values = torch.cat((earlier_values, values))
        if piece.request.own:
            keys, values = _kept(piece, layer, start, keys, values)
        if not len(queries):
            return queries
        return _causal(queries, keys, values, self._scale)

    def _decode_own(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        positions = self._plan.decode_positions
        for index, (request, position) in enumerate(zip(self._plan.decodes, positions, strict=True)):
            own_keys, own_values = request.own[layer]
            own_keys[:, position], own_values[:, position] = keys[index], values[index]
            out[index] = one_token_attention(
                queries[index], own_keys[:, : position + 1], own_values[:, : position + 1], self._scale
            )


def one_token_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return (q_heads, head_dim): one token attends to all rows of a request.

    Args:
        queries: (q_heads, head_dim), rotated.
        keys, values: (kv_heads, rows, head_dim), keys rotated.
        scale: factor on the scores.
    """
    if queries.dtype == torch.bfloat16:
        return one_token_host_attention(queries, keys, values, scale)
    grouped = queries.unflatten(0, (keys.shape[0], -1)).unsqueeze(0)
    attended = functional.scaled_dot_product_attention(grouped, keys.unsqueeze(0), values.unsqueeze(0), scale=scale)
    return attended[0].flatten(0, 1)


def _kept(piece: PackedPiece, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keep rows in the request's own copy, and return all of them up to the piece's last."""
    own_keys, own_values = piece.request.own[layer]
    stop = start + len(piece.token_ids)
    first = stop - len(keys)
    own_keys[:, first:stop], own_values[:, first:stop] = keys.transpose(0, 1), values.transpose(0, 1)
    if first == 0:
        return keys, values
    return own_keys[:, :stop].transpose(0, 1), own_values[:, :stop].transpose(0, 1)


def _causal(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported():
        return causal_host_attention(queries, keys, values, scale)
    return causal_attention(queries, keys, values, scale)
