"""Drafting on the GPU: several steps of a model behind each other, of which the host waits for the last alone.

The tokens that the drafter has not seen yet are one pass (`VerifyRunner`), and some more before it where they are many;
each further token is the replay of a CUDA graph that chooses its own token and leaves position, slot and token where
its next replay reads them. So any number of steps takes one graph a batch bucket, and one copy to the host.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.errors import GenerationError
from ragkit.generation.decode_state import DecodeState
from ragkit.generation.decoder import Decoder
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import MOST_RECORDED, READ_AT_ONCE
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.request_tables import (
    GraphMemory,
    HostInputs,
    RecordedForward,
    RequestTables,
    TablesByBucket,
)
from ragkit.generation.verify_runner import VerifyRunner
from ragkit.kernels.paged_decode_attention import paged_decode_attention
from ragkit.kernels.paged_verify_attention import MOST_DRAFTED
from ragkit.kernels.rope_write_kv import rope_write_kv
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV
from ragkit.kvcache.rope import RotaryTable

MOST_STEPS = MOST_DRAFTED
# Tokens that passes over what is not read yet are recorded for. A draft that stood or fell leaves one or two.
_FEW = (1, 2)
_MANY = (16, READ_AT_ONCE)


@dataclass(frozen=True, slots=True)
class DrawnSteps:
    """How tokens are drawn where the most likely one is not simply taken.

    Attributes:
        temperature: what logits are divided by; above 0.
        uniforms: (requests, steps) in [0, 1): which token each step draws.
    """

    temperature: float
    uniforms: Tensor


class DraftRunner:
    """Chains of tokens from a model that is read step by step (plain launches on a CPU, for tests).

    A request's rows behind `num_tokens` are overwritten by every call: who keeps drafted tokens raises `num_tokens`
    over those whose rows are written, all but the last. Thread-safe: calls do not overlap.

    Args:
        decoder: the model.
        pool: where its requests' rows are.
        scratch_slot: a row that nobody reads.
        reader: reads what a draft is more than two tokens behind; the model itself by default. Weights of 4 bits are
            made for one row or two, and the target's read many in the same time.
    """

    def __init__(self, decoder: Decoder, pool: KVPool, scratch_slot: int, reader: Decoder | None = None) -> None:
        self._decoder = decoder
        self._reader = reader or decoder
        self._memory = GraphMemory()
        self._pool = pool
        if self._reader is decoder:
            self._few = self._many = VerifyRunner(decoder, pool, scratch_slot, (*_FEW, *_MANY))
        else:
            self._few = VerifyRunner(decoder, pool, scratch_slot, _FEW)
            self._many = VerifyRunner(self._reader, pool, scratch_slot, _MANY)
        self._scratch_slot = scratch_slot
        self._tables = TablesByBucket(pool)
        self._buckets: dict[tuple[int, int, bool, bool], _Bucket] = {}
        self._lock = threading.Lock()

    def begin(self, kv: RequestKV, rotary: RotaryTable) -> DecodeState:
        """Return the state of a request; nothing is copied."""
        return DecodeState(kv, rotary)

    def draft(
        self,
        states: Sequence[DecodeState],
        pending: Sequence[Sequence[int]],
        steps: int,
        drawn: DrawnSteps | None = None,
    ) -> list[DraftTree]:
        """Return a chain of `steps` tokens a request behind its `pending` tokens, whose rows are kept.

        Args:
            states: the requests; rows are reserved for the pending tokens and for all drafted ones but the last.
            pending: one token or several that follow the written rows of each.
            steps: tokens of each chain, at most `MOST_STEPS`.
            drawn: how tokens are drawn; None takes the most likely ones, without probabilities.

        Raises:
            GenerationError: too many steps, or nothing pending.
        """
        if not 1 <= steps <= MOST_STEPS or not all(pending):
            raise GenerationError(f"1 to {MOST_STEPS} steps behind at least one token are drafted, got {steps} steps")
        last = [self._caught_up(state, tokens) for state, tokens in zip(states, pending, strict=True)]
        logits = self._read(states, last)
        with self._lock:
            bucket = self._bucket(states, drawn is not None)
            bucket.begin(states, steps, drawn)
            bucket.choose(torch.stack([rows[-1] for rows in logits]))
            for _ in range(steps - 1):
                bucket.step()
            return bucket.chains(len(states), steps)

    def prepare(self, states: Sequence[DecodeState]) -> None:
        """Record what drafts for these requests will replay, drawn and not, so that no token waits for it."""
        for runner in {self._few, self._many}:
            runner.prepare(states, READ_AT_ONCE - 1)
        with self._lock:
            for is_drawn in (False, True):
                bucket = self._bucket(states, is_drawn)
                bucket.tables.load(states)
                bucket.prepare()

    def _caught_up(self, state: DecodeState, tokens: Sequence[int]) -> Sequence[int]:
        """Return those of `tokens` that are left to the pass of all requests; the rows of those before are written."""
        if len(tokens) > MOST_RECORDED:
            ids = torch.tensor(tokens[:-1], device=self._pool.device)
            FullPrefill().extend(self._reader, state.kv, state.rotary, ids)
            return tokens[-1:]
        while len(tokens) > READ_AT_ONCE:
            self._read([state], [tokens[:READ_AT_ONCE]])
            tokens = tokens[READ_AT_ONCE:]
        return tokens

    def _read(self, states: Sequence[DecodeState], pending: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the logits after each of the tokens, whose rows are kept."""
        trees = [DraftTree.chain(tokens[1:]) for tokens in pending]
        runner = self._few if max(map(len, pending)) <= _FEW[-1] else self._many
        logits = runner.verify(states, [tokens[0] for tokens in pending], trees)
        for state, tree in zip(states, trees, strict=True):
            runner.commit(state, range(len(tree)))
        return logits

    def _bucket(self, states: Sequence[DecodeState], is_drawn: bool) -> _Bucket:
        tables = self._tables.of(states)
        key = (*tables.bucket, is_drawn)
        bucket = self._buckets.get(key)
        if bucket is None or bucket.tables is not tables:
            bucket = self._buckets[key] = _Bucket(
                self._decoder, self._pool, self._scratch_slot, tables, is_drawn, self._memory
            )
        return bucket


class _Bucket:
    """The buffers and the graph of one further step of up to as many requests as the tables have places."""

    def __init__(
        self, decoder: Decoder, pool: KVPool, scratch_slot: int, tables: RequestTables, is_drawn: bool,
        memory: GraphMemory,
    ) -> None:  # fmt: skip
        device, size = pool.device, tables.size
        self._decoder = decoder
        self._pool = pool
        self._scratch_slot = scratch_slot
        self.tables = tables
        # The slots of the steps and, last, the first position; the first step is the one behind the pending tokens.
        self._inputs = HostInputs((size, MOST_STEPS + 1), device)
        self._step = torch.zeros((1, 1), dtype=torch.int64, device=device)  # tokens chosen so far
        self._tokens = torch.zeros((size, MOST_STEPS), dtype=torch.int64, device=device)
        self._temperature = torch.ones((), dtype=torch.float32, device=device)
        self._uniforms = torch.zeros((size, MOST_STEPS), dtype=torch.float32, device=device)
        shape = (size, MOST_STEPS, decoder.config.vocab_size) if is_drawn else (0, 0, 0)
        self._probabilities = torch.zeros(shape, dtype=torch.float32, device=device)
        self._is_drawn = is_drawn
        self._recorded = RecordedForward(self._forward, device, memory)

    def prepare(self) -> None:
        """Record the step where it is not; recording steps several times over. The tables are loaded."""
        if not self._recorded.is_recorded:
            self._inputs.load(torch.full(self._inputs.device.shape, self._scratch_slot))
            self._inputs.device[:, -1] = 0
            self._step.fill_(1)
            self._recorded.record()

    def begin(self, states: Sequence[DecodeState], steps: int, drawn: DrawnSteps | None) -> None:
        """Load what the steps read: rows are written from `num_tokens` of each request on."""
        self.tables.load(states)
        self.prepare()
        rows = []
        for state in states:
            first = state.kv.num_tokens
            slots = [state.kv.slot(first + index) for index in range(steps - 1)]
            rows.append([*slots, *[self._scratch_slot] * (MOST_STEPS - len(slots)), first])
        unused = [[self._scratch_slot] * MOST_STEPS + [0]] * (self.tables.size - len(states))
        self._inputs.load(torch.tensor([*rows, *unused]))
        self._step.zero_()
        if drawn is not None:
            self._temperature.fill_(drawn.temperature)
            self._uniforms[: len(states), :steps] = drawn.uniforms.to(self._uniforms)

    def choose(self, logits: Tensor) -> None:
        """Note the next token of each of the first requests, for (requests, vocab_size) logits."""
        requests = len(logits)
        at = self._step.expand(requests, 1)
        if self._is_drawn:
            shares = (logits.float() / self._temperature).softmax(-1)
            reached = shares.cumsum(-1)
            goal = self._uniforms[:requests].gather(1, at) * reached[:, -1:]
            token = torch.searchsorted(reached, goal, right=True).clamp_(max=logits.shape[1] - 1)
            self._probabilities[:requests].scatter_(
                1, at.unsqueeze(2).expand(-1, -1, logits.shape[1]), shares.unsqueeze(1)
            )
        else:
            token = logits.argmax(-1, keepdim=True)
        self._tokens[:requests].scatter_(1, at, token)
        self._step += 1

    def step(self) -> None:
        """Run one more step behind the last token."""
        self._recorded.run()

    def chains(self, requests: int, steps: int) -> list[DraftTree]:
        """Return what was chosen; the host waits for it here."""
        tokens = self._tokens[:requests, :steps].tolist()
        if not self._is_drawn:
            return [DraftTree.chain(row) for row in tokens]
        shares = self._probabilities[:requests, :steps].clone()
        return [DraftTree.chain(row, own) for row, own in zip(tokens, shares, strict=True)]

    def _forward(self) -> Tensor:
        last = (self._step - 1).expand(self.tables.size, 1)
        token = self._tokens.gather(1, last).squeeze(1)
        self._slot = self._inputs.device.gather(1, last).squeeze(1)
        self._position = self._inputs.device[:, -1] + last.squeeze(1)
        self.choose(self._decoder.logits(self._decoder.run(token, self._attend)))
        return self._tokens

    def _attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tables = self.tables
        key_pool, value_pool = self._pool.keys[layer], self._pool.values[layer]
        rope_write_kv(
            queries, keys, values, self._position, self._slot, tables.cos, tables.sin, key_pool, value_pool,
            rotate_keys=False,
        )  # fmt: skip
        key_field, value_field = tables.fields(layer)
        return paged_decode_attention(
            queries, key_pool, value_pool, tables.block_tables, tables.row_positions, tables.num_entries,
            self._position, tables.cos, tables.sin, key_field=key_field, value_field=value_field,
            scale=self._decoder.scale,
        )  # fmt: skip
