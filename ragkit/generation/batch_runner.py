"""The steps of a batch on its device: tensors alone, no policy.

A mixed step is one packed pass: the tokens that decode and the pieces of prefills are multiplied by the weights
together. Where only decoding is left, a GPU replays the graph of the engine's `DecodeRunner`, or of its `VerifyRunner`
where tokens were drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkit.generation.decode_state import DecodeState, StepRunner
from ragkit.generation.decoder import Decoder
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.packed_attention import PackedAttention
from ragkit.generation.packed_pass import PackedPiece, PackedRequest, PackedRowsPlan
from ragkit.generation.verification import Verifier
from ragkit.kernels.backend import next_power_of_2
from ragkit.kernels.host_copy import to_device
from ragkit.kvcache.pool import KVPool
from ragkit.kvcache.request_kv import RequestKV, pack_rows
from ragkit.kvcache.rope import RotaryTable

_LEAST_ENTRIES = 64  # blocks of one request that the tables have room for from the start


class BatchRunner:
    """Keeps the rows of a batch's requests, and runs its steps.

    Args:
        decoder: the model.
        pool: where rows are.
        rotary: one table for all requests.
        steps: runs steps in which every request decodes, where attention is paged.
        verifier: verifies drafts over the same rows.
        is_paged: whether attention reads the pool's blocks, as on a GPU, or copies of each request's own.
    """

    def __init__(
        self, decoder: Decoder, pool: KVPool, rotary: RotaryTable, steps: StepRunner, verifier: Verifier, *,
        is_paged: bool,
    ) -> None:  # fmt: skip
        self._decoder = decoder
        self._pool = pool
        self._rotary = rotary
        self._steps = steps
        self.verifier = verifier
        self.is_paged = is_paged
        self._tables = _DeviceTables(pool) if is_paged else None
        self._places: list[PackedRequest] = []  # where requests stood in the last step of `steps`

    def open(
        self, beginning: PackedRequest | None, rows: int, *, capacity: int = 0, decodes: bool = True
    ) -> PackedRequest:
        """Return a request that lists the rows of `beginning`, with `rows` reserved behind them.

        Args:
            beginning: what it begins with; its rows need not be written before the same pass.
            rows: of its own.
            capacity: rows that it will have at most, those that it lists included.
            decodes: whether it will decode; a common beginning does not.

        Raises:
            CacheCapacityError: the pool has too few free blocks; nothing is held then.
        """
        kv = RequestKV(self._pool)
        stretches = () if beginning is None else beginning.stretches
        for blocks, length in stretches:
            kv.append_shared(blocks, length)
        listed = len(kv.block_ids)
        try:
            kv.reserve(kv.num_tokens + rows)
        except BaseException:
            kv.release()
            raise
        own = () if decodes else ((tuple(kv.block_ids[listed:]), rows),)
        request = PackedRequest(kv, max(capacity, kv.num_tokens + rows), (*stretches, *own))
        if decodes:
            self._make_own(request)
        return request

    def adopt(self, kv: RequestKV, capacity: int) -> PackedRequest:
        """Return a request whose prompt a strategy has prefilled."""
        request = PackedRequest(kv, capacity)
        self._make_own(request)
        if request.own:
            packed = pack_rows([kv])
            for layer, (own_keys, own_values) in enumerate(request.own):
                keys, values = kv.rows(layer, packed)
                own_keys[:, : len(keys)] = self._rotary.rotate(keys, packed.positions).transpose(0, 1)
                own_values[:, : len(keys)] = values.transpose(0, 1)
            request.num_own = kv.num_tokens
        return request

    def close(self, request: PackedRequest) -> None:
        """Give a request's rows up."""
        request.kv.release()
        request.own = []
        if self._tables is not None:
            self._tables.forget(request)

    def step(self, decodes: Sequence[PackedRequest], token_ids: Sequence[int], pieces: Sequence[PackedPiece]) -> Tensor:
        """Return (rows, vocab_size) logits: one row for each of `decodes`, then for each piece that wants them.

        Args:
            decodes: requests that get one more token, whose row is reserved.
            token_ids: their last tokens.
            pieces: pieces of prefills; a common beginning comes before those that list it.
        """
        if not self.is_paged or not decodes:
            return self._packed(decodes, token_ids, pieces)
        # Fields of blended requests are part of the graph of `steps`.
        if pieces and all(one.kv.field is None for one in decodes):
            return self._packed(decodes, token_ids, pieces)
        logits = self._replayed(decodes, token_ids)
        return torch.cat((logits, self._packed((), (), pieces))) if pieces else logits

    def _packed(
        self, decodes: Sequence[PackedRequest], token_ids: Sequence[int], pieces: Sequence[PackedPiece]
    ) -> Tensor:
        decoder = self._decoder
        plan = PackedRowsPlan(decodes, token_ids, pieces, decoder.device)
        last = decoder.config.num_layers - 1
        attend = PackedAttention(plan, self._pool, self._rotary, decoder.scale, last, self._tables)
        projected = decoder.run_to_last(plan.token_ids, attend)
        attended = attend(last, projected.queries, projected.keys, projected.values)
        plan.written()
        return decoder.logits(decoder.complete(last, attended, projected.residual[plan.wanted]))

    def verify(
        self, decodes: Sequence[PackedRequest], token_ids: Sequence[int], trees: Sequence[DraftTree]
    ) -> list[Tensor]:
        """Return (nodes + 1, vocab_size) logits a request, as `Verifier` says, whose `commit` is to follow.

        Args:
            decodes: requests, with rows reserved for their last tokens and all nodes.
            token_ids: their last tokens.
            trees: what was drafted behind these; may be empty.
        """
        order = self._places_of(decodes)
        states = [self.state(decodes[index]) for index in order]
        logits = self.verifier.verify(states, [token_ids[index] for index in order], [trees[index] for index in order])
        return [rows for _, rows in sorted(zip(order, logits, strict=True), key=lambda pair: pair[0])]

    def state(self, request: PackedRequest) -> DecodeState:
        """Return what runners of single steps take."""
        if request.state is None:
            if self.is_paged:
                request.state = self._steps.begin(request.kv, self._rotary)
            else:
                request.state = DecodeState(request.kv, self._rotary, tuple(request.own))
        return request.state

    def _replayed(self, decodes: Sequence[PackedRequest], token_ids: Sequence[int]) -> Tensor:
        order = self._places_of(decodes)
        logits = self._steps.step(
            [self.state(decodes[index]) for index in order], [token_ids[index] for index in order]
        )
        return logits[to_device(torch.tensor(order).argsort(), logits.device)]

    def _places_of(self, decodes: Sequence[PackedRequest]) -> list[int]:
        """Return the order of `decodes` in which each stays at its place of the graph's buffers as long as it can.

        Moving costs a copy of its table.
        """
        index = {one: at for at, one in enumerate(decodes)}
        placed = [one if one in index else None for one in self._places[: len(decodes)]]
        known = set(placed)
        fresh = iter([one for one in decodes if one not in known])
        placed += [None] * (len(decodes) - len(placed))
        self._places = [next(fresh) if one is None else one for one in placed]
        return [index[one] for one in self._places]

    def _make_own(self, request: PackedRequest) -> None:
        if self.is_paged:
            return
        for spec in self._pool.layout.layers:
            shape = (2, spec.num_kv_heads, request.capacity, spec.head_dim)
            keys, values = torch.empty(shape, dtype=self._pool.layout.dtype).unbind(0)
            request.own.append((keys, values))


class _DeviceTables:
    """Block tables on the device, each copied there again only when it changes."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._known: dict[PackedRequest, tuple[int, int]] = {}  # place and version
        self._free: list[int] = []
        self._make(1, _LEAST_ENTRIES)

    def of(self, requests: list[PackedRequest]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables of `requests` behind each other, as `DecodeTables` says."""
        entries = max(len(one.kv.block_ids) for one in requests)
        places, most = self._block_tables.shape
        if entries > most or len(self._known.keys() | set(requests)) > places:
            self._make(max(places, next_power_of_2(2 * len(requests))), max(most, next_power_of_2(entries)))
        for request in requests:
            self._update(request)
        order = torch.tensor([self._known[one][0] for one in requests])
        chosen = to_device(order, self._pool.device)
        return self._block_tables[chosen], self._row_positions[chosen], self._num_entries[chosen]

    def forget(self, request: PackedRequest) -> None:
        """Let the place of a request go."""
        place = self._known.pop(request, None)
        if place is not None:
            self._free.append(place[0])

    def _make(self, places: int, entries: int) -> None:
        device, size = self._pool.device, self._pool.block_size
        self._block_tables = torch.zeros((places, entries), dtype=torch.int32, device=device)
        self._row_positions = torch.zeros((places, entries, size), dtype=torch.int32, device=device)
        self._num_entries = torch.zeros(places, dtype=torch.int32, device=device)
        self._known.clear()
        self._free = list(range(places))

    def _update(self, request: PackedRequest) -> None:
        version = request.kv.version
        place, known = self._known.get(request, (-1, -1))
        if known == version:
            return
        if place < 0:
            place = self._free.pop()
        entries, device = len(request.kv.block_ids), self._pool.device
        head = to_device(torch.tensor([*request.kv.block_ids, entries], dtype=torch.int32), device)
        self._block_tables[place, :entries] = head[:-1]
        self._row_positions[place, :entries] = to_device(request.kv.row_positions, device)
        self._num_entries[place] = head[-1]
        self._known[request] = place, version
