"""What one packed pass is made of: rows of many requests behind each other, without padding.

Prepacking (arXiv 2404.09529) and ByteTransformer (arXiv 2210.03052): everything but attention works on the tokens of
all requests as one matrix; attention knows where each request begins and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ragkit.generation.decode_state import DecodeState
from ragkit.kernels.host_copy import to_device
from ragkit.kvcache.request_kv import PackedRows, RequestKV, pack_rows


@dataclass(slots=True, eq=False)
class PackedRequest:
    """One request, or one common beginning, as passes see it.

    Attributes:
        kv: its rows; written up to `kv.num_tokens`.
        capacity: rows that it will have at most, those that it lists included.
        stretches: blocks and rows of what others list that begin with it; of a common beginning alone.
        own: keys (rotated) and values (kv_heads, capacity, head_dim) of each layer in one run of memory, for devices
            without paged attention; empty elsewhere.
        num_own: rows of `own` that are written.
        state: what runners of single decoding steps keep of it.
    """

    kv: RequestKV
    capacity: int
    stretches: tuple[tuple[tuple[int, ...], int], ...] = ()
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    num_own: int = 0
    state: DecodeState | None = None


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """Neighbouring tokens of one prefill.

    Attributes:
        request: whose they are.
        token_ids: the tokens; they come right behind the rows that are written, or that this pass writes for another.
        wants_logits: whether the token after the last one is wanted.
    """

    request: PackedRequest
    token_ids: Sequence[int]
    wants_logits: bool


class PackedRowsPlan:
    """Where the tokens of one pass stand: those that decode first, one a request, then the pieces.

    Args:
        decodes: requests that get one token each, whose row is reserved.
        token_ids: those tokens.
        pieces: pieces of prefills, whose rows are reserved.
        device: of the pass.

    Attributes:
        token_ids: (tokens,) int64.
        positions: (tokens,) int64.
        slots: (tokens,) int64, rows of the pool.
        wanted: (rows,) int64, tokens whose logits are wanted: all that decode, and the last ones of pieces that say so.
        pooled: (rows,) int64, tokens whose rows go to the pool; None for all. Who keeps rows of its own never looks for
            them there, and a CPU's pool takes no memory where nothing is written.
        starts: position of the first token of each piece.
        bounds: piece i has the tokens from `bounds[i]` up to `bounds[i + 1]`.
        past: what each piece finds before it, None for nothing.
    """

    def __init__(
        self,
        decodes: Sequence[PackedRequest],
        token_ids: Sequence[int],
        pieces: Sequence[PackedPiece],
        device: torch.device,
    ) -> None:
        self.decodes, self.pieces = decodes, pieces
        self.decode_positions = [one.kv.num_tokens for one in decodes]
        self.starts = [piece.request.kv.num_tokens for piece in pieces]
        self.bounds = [len(decodes)]
        ids, wanted = list(token_ids), list(range(len(decodes)))
        positions = [torch.tensor(self.decode_positions, dtype=torch.int64)]
        slots = [torch.tensor([one.kv.slot(one.kv.num_tokens) for one in decodes], dtype=torch.int64)]
        for piece, start in zip(pieces, self.starts, strict=True):
            stop = start + len(piece.token_ids)
            ids += piece.token_ids
            positions.append(torch.arange(start, stop))
            slots.append(piece.request.kv.slots(start, stop))
            self.bounds.append(len(ids))
            if piece.wants_logits:
                wanted.append(len(ids) - 1)
        columns = torch.stack((torch.tensor(ids, dtype=torch.int64), torch.cat(positions), torch.cat(slots)))
        self.token_ids, self.positions, self.slots = to_device(columns, device).unbind(0)
        keeps_own = any(one.own for one in decodes) or any(piece.request.own for piece in pieces)
        self.pooled = self._without_own() if keeps_own else None
        self.wanted = to_device(torch.tensor(wanted, dtype=torch.int64), device)
        self.past: list[PackedRows | None] = [
            pack_rows([piece.request.kv]).to(device) if start and not piece.request.num_own else None
            for piece, start in zip(pieces, self.starts, strict=True)
        ]

    def _without_own(self) -> Tensor:
        """Return the tokens of those that keep no rows of their own."""
        empty = torch.empty(0, dtype=torch.int64)
        runs = zip(self.pieces, self.bounds, self.bounds[1:], strict=False)
        return torch.cat([empty, *(torch.arange(first, stop) for piece, first, stop in runs if not piece.request.own)])

    def written(self) -> None:
        """Note that the rows of the pass are written."""
        for one in self.decodes:
            one.kv.num_tokens += 1
        for piece in self.pieces:
            piece.request.kv.num_tokens += len(piece.token_ids)
            if piece.request.own:
                piece.request.num_own = piece.request.kv.num_tokens
