"""Decoding steps on the GPU: one CUDA graph replays the whole step of a batch bucket.

Request state is copied into the graph's own buffers: block table and row positions when they change, token,
position and slot every step. Attention reads the pool's blocks and rotates keys as it loads them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.errors import GenerationError
from ragkit.generation.decode_state import DecodeState
from ragkit.generation.decoder import Decoder
from ragkit.kernels.backend import next_power_of_2
from ragkit.kernels.paged_decode_attention import paged_decode_attention
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_field import RequestField
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable

_LEAST_ENTRIES = 256  # blocks of one request that the smallest graph takes
_WARM_UP_STEPS = 2


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

    def begin(self, kv: RequestKV, rotary: RotaryTable) -> DecodeState:
        """Return the state of a request; nothing is copied before its first step."""
        return DecodeState(kv, rotary)

    def step(self, states: Sequence[DecodeState], token_ids: Sequence[int]) -> Tensor:
        """Return (requests, vocab_size) logits after one more token a request."""
        entries = max(len(state.kv.block_ids) for state in states)
        has_field = any(state.kv.field is not None for state in states)
        key = (next_power_of_2(len(states)), max(_LEAST_ENTRIES, next_power_of_2(entries)), has_field)
        with self._lock:
            bucket = self._buckets.get(key)
            if bucket is None or not bucket.fits(states[0].rotary):
                bucket = self._buckets[key] = _Bucket(self._decoder, self._pool, self._scratch, *key, states[0].rotary)
            # A copy: the graph of the bucket writes there again for the next step, which may be another thread's.
            logits = bucket.run(states, token_ids)[: len(states)].clone()
        for state in states:
            state.kv.num_tokens += 1
        return logits


class _Bucket:
    """The buffers and the graph of up to `size` requests with up to `entries` blocks each, with or without fields."""

    def __init__(
        self, decoder: Decoder, pool: KVPool, scratch: int, size: int, entries: int, has_field: bool,
        rotary: RotaryTable,
    ) -> None:  # fmt: skip
        device = pool.device
        self._decoder = decoder
        self._pool = pool
        self._scratch_slot = scratch * pool.block_size
        self._block_tables = torch.zeros((size, entries), dtype=torch.int32, device=device)
        self._row_positions = torch.zeros((size, entries, pool.block_size), dtype=torch.int32, device=device)
        self._num_entries = torch.zeros(size, dtype=torch.int32, device=device)
        # Those of all places behind each other.
        self._field = RequestField(pool, size * entries) if has_field else None
        # Token, position and slot of each place travel together, in one copy a step.
        self._inputs = torch.zeros((3, size), dtype=torch.int64, device=device)
        self._host_inputs = torch.zeros((3, size), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._rotary_source = rotary
        self._cos, self._sin = rotary.cos.clone(), rotary.sin.clone()
        self._owners: list[tuple[DecodeState, int] | None] = [None] * size
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    def fits(self, rotary: RotaryTable) -> bool:
        """Return whether the graph's rotary buffers can hold the table."""
        return len(rotary.cos) <= len(self._cos)

    def run(self, states: Sequence[DecodeState], token_ids: Sequence[int]) -> Tensor:
        """Return (size, vocab_size) logits; rows past the requests mean nothing."""
        self._load(states, token_ids)
        if self._pool.device.type != "cuda":
            return self._forward()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._logits

    def _load(self, states: Sequence[DecodeState], token_ids: Sequence[int]) -> None:
        self._use_rotary(states)
        columns = []
        for index, (state, token) in enumerate(zip(states, token_ids, strict=True)):
            position = state.kv.num_tokens
            columns.append((token, position, state.kv.slot(position)))
            owner = self._owners[index]
            if owner is None or owner[0] is not state or owner[1] != state.kv.version:
                self._load_table(index, state)
                if owner is None or owner[0] is not state:  # of one request it never changes
                    self._load_field(index, state.kv.field)
        for index in range(len(states), len(self._owners)):
            if self._owners[index] is not None:
                self._owners[index] = None
                self._num_entries[index] = 0
        columns += [(0, 0, self._scratch_slot)] * (len(self._owners) - len(states))
        if self._copied is not None:
            self._copied.synchronize()  # the copy of the step before may still be reading the host buffer
        self._host_inputs.copy_(torch.tensor(columns).T)
        self._inputs.copy_(self._host_inputs, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _load_table(self, index: int, state: DecodeState) -> None:
        entries = len(state.kv.block_ids)
        self._block_tables[index, :entries] = torch.tensor(state.kv.block_ids, dtype=torch.int32)
        self._row_positions[index, :entries] = state.kv.row_positions.to(self._pool.device)
        self._num_entries[index] = entries
        self._owners[index] = (state, state.kv.version)

    def _load_field(self, index: int, field: RequestField | None) -> None:
        if self._field is None:
            return
        entries = self._block_tables.shape[1]
        for layer in range(self._pool.layout.num_layers):
            own, theirs = self._field.layer(layer), None if field is None else field.layer(layer)
            for target, source in zip(own or (), theirs or own or (), strict=True):
                place = target[index * entries : (index + 1) * entries]
                count = 0 if theirs is None else len(source)
                place[:count] = source[:count]
                place[count:] = 0

    def _use_rotary(self, states: Sequence[DecodeState]) -> None:
        rotary = states[0].rotary
        if any(state.rotary is not rotary for state in states):
            raise GenerationError("requests of one decoding step must share their rotary table")
        if rotary is not self._rotary_source:
            rows = len(rotary.cos)
            self._cos[:rows], self._sin[:rows] = rotary.cos, rotary.sin
            self._rotary_source = rotary

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):  # compiles kernels and opens libraries, which a capture must not
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads' requests go on meanwhile
            self._logits = self._forward()
        self._graph = graph

    def _forward(self) -> Tensor:
        return self._decoder.logits(self._decoder.run(self._inputs[0], self._attend))

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        positions, slots = self._inputs[1], self._inputs[2]
        key_pool, value_pool = self._pool.keys[layer], self._pool.values[layer]
        rope_write_kv(
            queries, keys, values, positions, slots, self._cos, self._sin, key_pool, value_pool, rotate_keys=False
        )
        key_field, value_field = (None, None) if self._field is None else self._field.of_requests(layer, len(queries))
        return paged_decode_attention(
            queries, key_pool, value_pool, self._block_tables, self._row_positions, self._num_entries, positions,
            self._cos, self._sin, key_field=key_field, value_field=value_field, scale=self._decoder.scale,
        )  # fmt: skip
