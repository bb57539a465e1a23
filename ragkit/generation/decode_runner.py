"""Decoding steps on the GPU: one CUDA graph replays the whole step of a batch bucket.

Request state is copied into the graph's own buffers: block table and row positions when they change, token,
position and slot every step. Attention reads the pool's blocks and rotates keys as it loads them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.generation.decode_state import DecodeState
from ragkit.generation.decoder import Decoder
from ragkit.generation.request_tables import HostInputs, RecordedForward, RequestTables, table_bucket
from ragkit.kernels.paged_decode_attention import paged_decode_attention
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable


class DecodeRunner:
    """Decoding steps with the paged kernel, as a CUDA graph a batch bucket (plain launches elsewhere, for tests).

    Buckets are powers of two of the number of requests and of their table entries, apart for steps in which a request
    has a field (`RequestField`): others are spared its memory and its loads. A graph is captured when its bucket is
    first used. Thread-safe: steps of one runner do not overlap.
    """

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self._decoder = decoder
        self._pool = pool
        self._scratch = pool.allocate(1)[0]  # rows that unused places of a bucket write to
        self._buckets: dict[tuple[int, int, bool], _Bucket] = {}
        self._lock = threading.Lock()

    @property
    def scratch_slot(self) -> int:
        """A row that nobody reads: what passes beside this runner's may write for places that no token has."""
        return self._scratch * self._pool.block_size

    def begin(self, kv: RequestKV, rotary: RotaryTable) -> DecodeState:
        """Return the state of a request; nothing is copied before its first step."""
        return DecodeState(kv, rotary)

    def step(self, states: Sequence[DecodeState], token_ids: Sequence[int]) -> Tensor:
        """Return (requests, vocab_size) logits after one more token a request."""
        with self._lock:
            # A copy: the graph of the bucket writes there again for the next step, which may be another thread's.
            logits = self._bucket(states).run(states, token_ids)[: len(states)].clone()
        for state in states:
            state.kv.num_tokens += 1
        return logits

    def prepare(self, states: Sequence[DecodeState]) -> None:
        """Record what a step of these requests will replay, so that no token waits for it."""
        with self._lock:
            self._bucket(states).prepare(states)

    def _bucket(self, states: Sequence[DecodeState]) -> _Bucket:
        key, rotary = table_bucket(states), states[0].rotary
        bucket = self._buckets.get(key)
        if bucket is None or not bucket.tables.fits(rotary):
            tables = RequestTables(self._pool, *key, rotary)
            bucket = self._buckets[key] = _Bucket(self._decoder, self._pool, self.scratch_slot, tables)
        return bucket


class _Bucket:
    """The buffers and the graph of up to as many requests as the tables have places."""

    def __init__(self, decoder: Decoder, pool: KVPool, scratch_slot: int, tables: RequestTables) -> None:
        self._decoder = decoder
        self._pool = pool
        self._scratch_slot = scratch_slot
        self.tables = tables
        # Token, position and slot of each place travel together, in one copy a step.
        self._inputs = HostInputs((3, tables.size), pool.device)
        self._recorded = RecordedForward(self._forward, pool.device)

    def run(self, states: Sequence[DecodeState], token_ids: Sequence[int]) -> Tensor:
        """Return (size, vocab_size) logits; rows past the requests mean nothing."""
        self.tables.load(states)
        columns = [
            (token, state.kv.num_tokens, state.kv.slot(state.kv.num_tokens))
            for state, token in zip(states, token_ids, strict=True)
        ]
        columns += [(0, 0, self._scratch_slot)] * (self.tables.size - len(states))
        self._inputs.load(torch.tensor(columns).T)
        return self._recorded.run()

    def prepare(self, states: Sequence[DecodeState]) -> None:
        """Record the step where it is not, over places that no request has."""
        if not self._recorded.is_recorded:
            self.tables.load(states)
            self._inputs.load(torch.tensor([(0, 0, self._scratch_slot)] * self.tables.size).T)
            self._recorded.record()

    def _forward(self) -> Tensor:
        return self._decoder.logits(self._decoder.run(self._inputs.device[0], self._attend))

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tables, (_, positions, slots) = self.tables, self._inputs.device
        key_pool, value_pool = self._pool.keys[layer], self._pool.values[layer]
        rope_write_kv(
            queries, keys, values, positions, slots, tables.cos, tables.sin, key_pool, value_pool, rotate_keys=False
        )
        key_field, value_field = tables.fields(layer)
        return paged_decode_attention(
            queries, key_pool, value_pool, tables.block_tables, tables.row_positions, tables.num_entries, positions,
            tables.cos, tables.sin, key_field=key_field, value_field=value_field, scale=self._decoder.scale,
        )  # fmt: skip
