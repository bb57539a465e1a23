"""Verification on the GPU: one CUDA graph replays the pass over all drafted tokens of a batch bucket.

As `DecodeRunner`, whose states it takes and beside which it runs. A pass over up to 32 tokens a request reads weights
and context once, like a step of one token. Every token writes its row at once, in the order of the tree; rows of an
accepted path that is no prefix of that order are moved together afterwards, which un-rotated keys allow.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.errors import GenerationError
from ragkit.generation.decode_state import DecodeState
from ragkit.generation.decoder import Decoder
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.request_tables import (
    GraphMemory,
    HostInputs,
    RecordedForward,
    RequestTables,
    TablesByBucket,
)
from ragkit.kernels.paged_verify_attention import MOST_DRAFTED, paged_verify_attention
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kvcache.pool import KVPool

MOST_NODES = MOST_DRAFTED - 1  # of a tree; the last accepted token is verified with them
ROW_BUCKETS = (2, 4, 8, 16, MOST_DRAFTED)  # tokens of a request that graphs are recorded for


class VerifyRunner:
    """The `Verifier` with the paged kernel, as a CUDA graph a bucket (plain launches elsewhere, for tests).

    Buckets are those of `DecodeRunner`, and of each some numbers of tokens of a request; they share their tables and
    the memory of their graphs. Thread-safe: passes of one runner do not overlap.

    Args:
        decoder: the model.
        pool: where the rows are.
        scratch_slot: a row that nobody reads (`DecodeRunner.scratch_slot`); places that no token has write there.
        row_buckets: tokens of a request that a graph takes, ascending; the last is the most that a pass can.
    """

    def __init__(
        self, decoder: Decoder, pool: KVPool, scratch_slot: int, row_buckets: Sequence[int] = ROW_BUCKETS
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._scratch_slot = scratch_slot
        self._row_buckets = tuple(row_buckets)
        self._tables = TablesByBucket(pool)
        self._memory = GraphMemory()
        self._buckets: dict[tuple[int, int, bool, int], _Bucket] = {}
        self._moves = _RowMoves(pool, scratch_slot, self._memory)
        self._lock = threading.Lock()

    def verify(
        self, states: Sequence[DecodeState], token_ids: Sequence[int], trees: Sequence[DraftTree]
    ) -> list[Tensor]:
        """Return (nodes + 1, vocab_size) logits a request, as `Verifier` says.

        Raises:
            GenerationError: a tree has more nodes than a pass takes, `MOST_NODES` or fewer.
        """
        most = max(len(tree) for tree in trees)
        if most >= self._row_buckets[-1]:
            raise GenerationError(
                f"a pass verifies at most {self._row_buckets[-1] - 1} drafted tokens of a request, got {most}"
            )
        with self._lock:
            logits = self._bucket(states, most + 1).run(states, token_ids, trees)
            # Copies: the graph of the bucket writes there again for the next pass, which may be another thread's.
            return [rows[: len(tree) + 1].clone() for rows, tree in zip(logits, trees, strict=False)]

    def commit(self, state: DecodeState, accepted: Sequence[int]) -> None:
        """Keep the rows of the accepted path, as `Verifier` says."""
        kv = state.kv
        start = kv.num_tokens + 1
        moved = [(start + node, start + index) for index, node in enumerate(accepted) if node != index]
        if moved:
            with self._lock:
                self._moves.run([(kv.slot(source), kv.slot(target)) for source, target in moved])
        kv.num_tokens = start + len(accepted)

    def prepare(self, states: Sequence[DecodeState], most_nodes: int = MOST_NODES) -> None:
        """Record what passes over these requests, of trees with up to so many nodes, will replay."""
        with self._lock:
            for rows in self._row_buckets:
                self._bucket(states, rows).prepare(states)
                if rows > most_nodes:
                    break
            self._moves.prepare()

    def _bucket(self, states: Sequence[DecodeState], rows: int) -> _Bucket:
        tables = self._tables.of(states)
        key = (*tables.bucket, next(bucket for bucket in self._row_buckets if bucket >= rows))
        bucket = self._buckets.get(key)
        if bucket is None or bucket.tables is not tables:
            bucket = self._buckets[key] = _Bucket(
                self._decoder, self._pool, self._scratch_slot, tables, key[3], self._memory
            )
        return bucket


class _Bucket:
    """The buffers and the graph of up to as many requests as the tables have places, with `rows` tokens each."""

    def __init__(
        self, decoder: Decoder, pool: KVPool, scratch_slot: int, tables: RequestTables, rows: int, memory: GraphMemory
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._rows = rows
        self.tables = tables
        tokens = tables.size * rows
        # Token, position, slot and mask of each place, and where each request's begin, in one copy.
        self._unused = (0, 0, scratch_slot, 0)
        self._inputs = HostInputs((4 * tokens + tables.size,), pool.device)
        self._token_ids, self._positions, self._slots, self._masks = self._inputs.device[: 4 * tokens].view(4, tokens)
        self._first_positions = self._inputs.device[4 * tokens :]
        self._ancestors = torch.zeros(tokens, dtype=torch.int32, device=pool.device)
        self._recorded = RecordedForward(self._forward, pool.device, memory)

    def prepare(self, states: Sequence[DecodeState]) -> None:
        """Record the pass where it is not, over places that no token has."""
        if not self._recorded.is_recorded:
            self.tables.load(states)
            unused = torch.tensor([self._unused] * (self._rows * self.tables.size)).T.flatten()
            self._inputs.load(torch.cat((unused, torch.zeros(self.tables.size, dtype=torch.int64))))
            self._recorded.record()

    def run(self, states: Sequence[DecodeState], token_ids: Sequence[int], trees: Sequence[DraftTree]) -> Tensor:
        """Return (size, rows, vocab_size) logits; those of places that no token has mean nothing."""
        self.tables.load(states)
        columns: list[tuple[int, int, int, int]] = []
        for state, token, tree in zip(states, token_ids, trees, strict=True):
            columns += _columns(state, token, tree)
            columns += [self._unused] * (self._rows - 1 - len(tree))
        columns += [self._unused] * (self._rows * self.tables.size - len(columns))
        firsts = [state.kv.num_tokens for state in states] + [0] * (self.tables.size - len(states))
        self._inputs.load(torch.cat((torch.tensor(columns).T.flatten(), torch.tensor(firsts))))
        logits = self._recorded.run()
        return logits.view(self.tables.size, self._rows, logits.shape[1])

    def _forward(self) -> Tensor:
        self._ancestors.copy_(self._masks)
        return self._decoder.logits(self._decoder.run(self._token_ids, self._attend))

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tables = self.tables
        key_pool, value_pool = self._pool.keys[layer], self._pool.values[layer]
        rope_write_kv(
            queries, keys, values, self._positions, self._slots, tables.cos, tables.sin, key_pool, value_pool,
            rotate_keys=True,
        )  # fmt: skip
        key_field, value_field = tables.fields(layer)
        return paged_verify_attention(
            queries, keys, values, key_pool, value_pool, tables.block_tables, tables.row_positions,
            tables.num_entries, self._first_positions, self._ancestors, tables.cos, tables.sin, bases=tables.bases,
            key_field=key_field, value_field=value_field, scale=self._decoder.scale,
        )  # fmt: skip


def _columns(state: DecodeState, token: int, tree: DraftTree) -> list[tuple[int, int, int, int]]:
    """Return token, true position, slot and mask of the last token and of each node; bit 0 stands for the former."""
    first = state.kv.num_tokens
    columns = [(token, first, state.kv.slot(first), 1)]
    for node, (node_token, parent, position) in enumerate(
        zip(tree.token_ids, tree.parents, tree.positions(first + 1), strict=True)
    ):
        seen = columns[parent + 1][3] | 1 << (node + 1)
        columns.append((node_token, position, state.kv.slot(first + 1 + node), seen))
    # As the signed numbers of 32 bits that have these bits.
    return [(token, at, slot, mask - (1 << 32) if mask >> 31 else mask) for token, at, slot, mask in columns]


class _RowMoves:
    """Moves rows of all layers to other slots at once; a CUDA graph, of which the slots are the only input."""

    def __init__(self, pool: KVPool, scratch_slot: int, memory: GraphMemory) -> None:
        self._pool = pool
        self._unused = (scratch_slot, scratch_slot)
        self._inputs = HostInputs((2, MOST_NODES), pool.device)
        self._recorded = RecordedForward(self._forward, pool.device, memory)

    def run(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy all layers' rows from the first slot of each pair to the second; all are read before one is written."""
        self.prepare()
        self._load(moves)
        self._recorded.run()

    def prepare(self) -> None:
        """Record the moves where they are not; recording moves several times over."""
        if not self._recorded.is_recorded:
            self._load([])
            self._recorded.record()

    def _load(self, moves: Sequence[tuple[int, int]]) -> None:
        self._inputs.load(torch.tensor([*moves, *[self._unused] * (MOST_NODES - len(moves))]).T)

    def _forward(self) -> Tensor:
        sources, targets = self._inputs.device.unbind()
        for pool in (*self._pool.keys, *self._pool.values):
            rows = pool.flatten(0, 1)
            rows.index_copy_(0, targets, rows[sources])
        return targets
