"""Decoding steps in plain torch, on private copies of each request's keys and values.

Gathering a request's blocks and rotating their keys would copy the whole KV for every token. So decoding keeps the
keys rotated, in one run of memory a layer, and adds one row a step: twice the memory of the request while it
decodes, for steps whose attention reads every row once. The pool's un-rotated rows are written as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.generation.decode_state import DecodeState
from ragkit.generation.decoder import Decoder
from ragkit.generation.host_attention import few_tokens_host_attention, takes_few_tokens
from ragkit.kernels.row_scores import padded_rows
from ragkit.kvcache.request_kv import RequestKV, pack_rows
from ragkit.kvcache.rope import RotaryTable, rotate


class ContiguousDecodeRunner:
    """Decoding steps for devices without the paged kernel; also the reference of the runner that has it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def begin(self, kv: RequestKV, rotary: RotaryTable) -> DecodeState:
        """Return the state of a request, with room for all positions that `kv` has reserved."""
        packed = pack_rows([kv]).to(kv.pool.device)
        count = len(packed.slots)
        private = []
        for layer in range(kv.pool.layout.num_layers):
            keys, values = kv.rows(layer, packed)
            # Whole multiples of rows are attended to: those behind the last are masked, and must be numbers for that.
            room = (keys.shape[1], padded_rows(kv.num_reserved), keys.shape[2])
            own_keys, own_values = keys.new_empty(room), values.new_empty(room)
            own_keys[:, count:], own_values[:, count:] = 0, 0
            own_keys[:, :count] = rotary.rotate(keys, packed.positions).transpose(0, 1)
            own_values[:, :count] = values.transpose(0, 1)
            private.append((own_keys, own_values))
        return DecodeState(kv, rotary, tuple(private))

    def step(self, states: Sequence[DecodeState], token_ids: Sequence[int]) -> Tensor:
        """Return (requests, vocab_size) logits after one more token a request."""
        attend = _ContiguousAttention(states, self._decoder.scale)
        logits = self._decoder.logits(self._decoder.run(list(token_ids), attend))
        for state in states:
            state.kv.num_tokens += 1
        return logits


class _ContiguousAttention:
    """The `Attend` of one step: the token of request i attends to the private rows of `states[i]`."""

    def __init__(self, states: Sequence[DecodeState], scale: float) -> None:
        self._states = states
        self._scale = scale
        self._pool = states[0].kv.pool
        self._positions = [state.kv.num_tokens for state in states]
        slots = [state.kv.slot(state.kv.num_tokens) for state in states]
        self._slots = torch.tensor(slots).to(self._pool.device)
        self._cos = torch.stack([state.rotary.cos[state.kv.num_tokens] for state in states])
        self._sin = torch.stack([state.rotary.sin[state.kv.num_tokens] for state in states])

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output, as `Attend` says."""
        self._pool.keys[layer].flatten(0, 1)[self._slots] = keys
        self._pool.values[layer].flatten(0, 1)[self._slots] = values
        heads = rotate(torch.cat((queries, keys), dim=1), self._cos, self._sin)
        queries, keys = heads.split([queries.shape[1], keys.shape[1]], dim=1)
        out = torch.empty_like(queries)
        for index, (state, position) in enumerate(zip(self._states, self._positions, strict=True)):
            own_keys, own_values = state.private[layer]
            own_keys[:, position], own_values[:, position] = keys[index], values[index]
            # The query heads of one key head stand as rows of one product: the keys are read once for all of them.
            grouped = queries[index].unflatten(0, (own_keys.shape[0], -1))
            out[index] = self._attended(grouped, own_keys, own_values, position + 1).flatten(0, 1)
        return out

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, seen: int) -> Tensor:
        if takes_few_tokens(keys, seen):
            rows = padded_rows(seen)
            visible = keys.new_zeros((queries.shape[1], rows - seen))
            return few_tokens_host_attention(queries, keys[:, :rows], values[:, :rows], self._scale, visible)
        return functional.scaled_dot_product_attention(
            queries.unsqueeze(0), keys[None, :, :seen], values[None, :, :seen], scale=self._scale
        )[0]
