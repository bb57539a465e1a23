"""Exact causal attention of fresh tokens behind rows that exist already, and the pass that keeps its own KV."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kvcache.request_kv import RequestKV, pack_rows
from ragkit.kvcache.rope import RotaryTable

_CPU_QUERY_BLOCK = 512  # bounds the mask that CPU attention needs behind earlier rows


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return (tokens, q_heads, head_dim): the last `tokens` rows attend to themselves and all rows before.

    Args:
        queries: (tokens, q_heads, head_dim), rotated.
        keys, values: (rows, kv_heads, head_dim), rows >= tokens, keys rotated; the last `tokens` are the queries' own.
        scale: factor on the scores.
    """
    heads, stored, content = (part.transpose(0, 1).unsqueeze(0) for part in (queries, keys, values))
    tokens, rows = queries.shape[0], keys.shape[0]
    grouped = queries.shape[1] != keys.shape[1]
    if tokens == rows:
        out = functional.scaled_dot_product_attention(
            heads, stored, content, is_causal=True, scale=scale, enable_gqa=grouped
        )
    elif queries.is_cuda:
        from torch.nn.attention.bias import causal_lower_right

        out = functional.scaled_dot_product_attention(
            heads, stored, content, attn_mask=causal_lower_right(tokens, rows), scale=scale, enable_gqa=grouped
        )
    else:
        out = _masked_blocks(heads, stored, content, scale, grouped)
    return out.squeeze(0).transpose(0, 1)


class PrefillAttention:
    """The `Attend` of a prefill: writes the fresh rows into the pool and attends to all rows up to them.

    Args:
        request: its positions `start` to `start + tokens` are reserved; all before are written.
        rotary: the request's rotary table.
        start: position of the first fresh token.
        tokens: number of fresh tokens.
        scale: factor on the scores.
        last_only_in: the layer in which only the last token attends, for who wants its logits alone: above the last
            layer's keys and values nobody looks at the others.
    """

    def __init__(
        self,
        request: RequestKV,
        rotary: RotaryTable,
        start: int,
        tokens: int,
        scale: float,
        *,
        last_only_in: int | None = None,
    ) -> None:
        device = request.pool.device
        self._last_only_in = last_only_in
        self._request = request
        self._pool = request.pool
        self._rotary = rotary
        self._scale = scale
        self._positions = torch.arange(start, start + tokens, device=device)
        self._slots = request.slots(start, start + tokens).to(device)
        self._past = pack_rows([request]).to(device) if start else None

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output, as `Attend` says."""
        rope_write_kv(
            queries, keys, values, self._positions, self._slots, self._rotary.cos, self._rotary.sin,
            self._pool.keys[layer], self._pool.values[layer], rotate_keys=True,
        )  # fmt: skip
        if self._past is not None:
            earlier_keys, earlier_values = self._request.rows(layer, self._past)
            keys = torch.cat((self._rotary.rotate(earlier_keys, self._past.positions), keys))
            values = torch.cat((earlier_values, values))
        if layer == self._last_only_in:
            queries = queries[-1:]
        return causal_attention(queries, keys, values, self._scale)


class StandaloneAttention:
    """The `Attend` of a pass outside the pool: attends behind given rows and keeps its own.

    Args:
        rotary: the rotary table.
        scale: factor on the scores.
        past: keys (un-rotated) and values (rows, kv_heads, head_dim) of each layer, standing at positions 0 up.
        keep: whether to keep the fresh rows in `kept`.

    Attributes:
        kept: keys (un-rotated) and values of the fresh tokens of each layer so far.
    """

    def __init__(
        self,
        rotary: RotaryTable,
        scale: float,
        past: Sequence[tuple[Tensor, Tensor]] = (),
        *,
        keep: bool = True,
    ) -> None:
        self._rotary = rotary
        self._scale = scale
        self._past = past
        self._keep = keep
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output, as `Attend` says."""
        if self._keep:
            self.keep_rows(keys, values)
        if self._past:
            earlier_keys, earlier_values = self._past[layer]
            keys, values = torch.cat((earlier_keys, keys)), torch.cat((earlier_values, values))
        positions = torch.arange(len(keys), device=keys.device)
        rotated = self._rotary.rotate(keys, positions)
        queries = self._rotary.rotate(queries, positions[len(keys) - len(queries) :])
        return causal_attention(queries, rotated, values, self._scale)

    def keep_rows(self, keys: Tensor, values: Tensor) -> None:
        """Keep the rows of the next layer, which may be all that is wanted of it."""
        self.kept.append((keys.clone(), values.clone()))


def _masked_blocks(queries: Tensor, keys: Tensor, values: Tensor, scale: float, grouped: bool) -> Tensor:
    tokens, rows = queries.shape[2], keys.shape[2]
    position = torch.arange(rows)
    out = torch.empty_like(queries)
    for start in range(0, tokens, _CPU_QUERY_BLOCK):
        stop = min(start + _CPU_QUERY_BLOCK, tokens)
        reach = rows - tokens + stop  # nothing after the block's last row is seen by any of its rows
        mask = position[:reach] <= torch.arange(rows - tokens + start, reach).unsqueeze(1)
        out[:, :, start:stop] = functional.scaled_dot_product_attention(
            queries[:, :, start:stop], keys[:, :, :reach], values[:, :, :reach],
            attn_mask=mask, scale=scale, enable_gqa=grouped,
        )  # fmt: skip
    return out
