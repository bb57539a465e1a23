"""Verification in plain torch, on the private copies of keys and values that contiguous decoding keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ragkit.generation.decode_state import DecodeState
from ragkit.generation.decoder import Decoder
from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.host_attention import few_tokens_host_attention, takes_few_tokens
from ragkit.kernels.row_scores import padded_rows
from ragkit.kvcache.rope import rotate


class ContiguousVerifier:
    """The `Verifier` beside `ContiguousDecodeRunner`, whose states it takes; also the reference of the one on the GPU.

    Between attentions all rows of all requests are one product, which reads the weights once. A pass over a few rows is
    bound by that reading, so that it costs little more than a step.

    Args:
        decoder: the model.
        writes_pool: whether the pool's rows are written as well; who never reads them there need not.
    """

    def __init__(self, decoder: Decoder, *, writes_pool: bool = True) -> None:
        self._decoder = decoder
        self._writes_pool = writes_pool

    def verify(
        self, states: Sequence[DecodeState], token_ids: Sequence[int], trees: Sequence[DraftTree]
    ) -> list[Tensor]:
        """Return (nodes + 1, vocab_size) logits a request, as `Verifier` says."""
        tokens = [token for last, tree in zip(token_ids, trees, strict=True) for token in (last, *tree.token_ids)]
        attend = _TreeAttention(states, trees, self._decoder, writes_pool=self._writes_pool)
        logits = self._decoder.logits(self._decoder.run(tokens, attend))
        return list(logits.split([len(tree) + 1 for tree in trees]))

    def commit(self, state: DecodeState, accepted: Sequence[int]) -> None:
        """Keep the accepted rows, as `Verifier` says."""
        kv = state.kv
        first = kv.num_tokens + 1
        kv.num_tokens += len(accepted) + 1
        if list(accepted) == list(range(len(accepted))):
            return  # they stand where they belong
        nodes = torch.tensor(accepted)
        sources = kv.slots(first, kv.num_reserved)[nodes].to(kv.pool.device)
        targets = kv.slots(first, first + len(accepted)).to(kv.pool.device)
        for keys, values in zip(kv.pool.keys, kv.pool.values, strict=True) if self._writes_pool else ():
            for pool in (keys.flatten(0, 1), values.flatten(0, 1)):
                pool[targets] = pool[sources]
        rows = (first + nodes).to(kv.pool.device)
        for pair in state.private:
            for private in pair:  # rotated to the true positions already
                private[:, first : first + len(accepted)] = private[:, rows]


class _Span(NamedTuple):
    """The rows of one request in a pass."""

    state: DecodeState
    start: int  # first row of the pass
    rows: int  # last token and nodes
    base: int  # rows before them in the private copies
    read: int  # rows that are attended to, masked ones included
    mask: Tensor | None  # added to the scores; behind many rows what is visible of the last of them


class _TreeAttention:
    """The `Attend` of one pass: the rows of each request attend to its private rows and to their own ancestors."""

    def __init__(
        self, states: Sequence[DecodeState], trees: Sequence[DraftTree], decoder: Decoder, *, writes_pool: bool
    ) -> None:
        self._writes_pool = writes_pool
        self._scale = decoder.scale
        group = decoder.config.num_q_heads // decoder.config.num_kv_heads
        self._pool = states[0].kv.pool
        device = self._pool.device
        self._spans: list[_Span] = []
        slots, cos, sin, start = [], [], [], 0
        for state, tree in zip(states, trees, strict=True):
            base, rows = state.kv.num_tokens, len(tree) + 1
            slots.append(state.kv.slots(base, base + rows))
            positions = torch.tensor((base, *tree.positions(base + 1))).to(device)
            cos.append(state.rotary.cos[positions])
            sin.append(state.rotary.sin[positions])
            is_padded = takes_few_tokens(state.private[0][0], base + rows)
            read = padded_rows(base + rows) if is_padded else base + rows
            mask = self._tail(tree, read - base, group) if is_padded else self._mask(tree, base, group)
            self._spans.append(_Span(state, start, rows, base, read, mask))
            start += rows
        self._slots = torch.cat(slots).to(device)
        self._cos, self._sin = torch.cat(cos), torch.cat(sin)

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output, as `Attend` says."""
        if self._writes_pool:
            self._pool.keys[layer].flatten(0, 1)[self._slots] = keys
            self._pool.values[layer].flatten(0, 1)[self._slots] = values
        heads = rotate(torch.cat((queries, keys), dim=1), self._cos, self._sin)
        queries, keys = heads.split([queries.shape[1], keys.shape[1]], dim=1)
        out = torch.empty_like(queries)
        for state, start, rows, base, read, mask in self._spans:
            own_keys, own_values = state.private[layer]
            stop, end = start + rows, base + rows
            own_keys[:, base:end] = keys[start:stop].transpose(0, 1)
            own_values[:, base:end] = values[start:stop].transpose(0, 1)
            # The query heads of one key head stand as rows of one product, for all nodes: the keys are read once.
            grouped = queries[start:stop].unflatten(1, (own_keys.shape[0], -1)).permute(1, 2, 0, 3).flatten(1, 2)
            seen, content = own_keys[:, :read], own_values[:, :read]
            if mask is not None and takes_few_tokens(own_keys, end):
                attended = few_tokens_host_attention(grouped, seen, content, self._scale, mask)
            else:
                attended = functional.scaled_dot_product_attention(
                    grouped.unsqueeze(0), seen.unsqueeze(0), content.unsqueeze(0), attn_mask=mask, scale=self._scale
                )[0]
            shape = (own_keys.shape[0], -1, rows, queries.shape[2])
            out[start:stop] = attended.reshape(shape).permute(2, 0, 1, 3).flatten(1, 2)
        return out

    def _mask(self, tree: DraftTree, base: int, group: int) -> Tensor | None:
        """Return (group * rows, base + rows): the rows of each query head behind each other; None hides nothing."""
        rows = len(tree) + 1
        if rows == 1:
            return None
        seen = torch.ones((rows, base + rows), dtype=torch.bool)
        seen[0, base + 1 :] = False
        seen[1:, base + 1 :] = tree.ancestors()
        mask = torch.zeros(seen.shape, dtype=self._pool.layout.dtype).masked_fill_(~seen, -torch.inf)
        return mask.repeat(group, 1).to(self._pool.device)

    def _tail(self, tree: DraftTree, count: int, group: int) -> Tensor:
        """Return (group * rows, count): 1 where a row sees one of the last, that of the last token first, else 0."""
        rows = len(tree) + 1
        visible = torch.zeros((rows, count), dtype=self._pool.layout.dtype)
        visible[:, 0] = 1
        visible[1:, 1:rows] = tree.ancestors()
        return visible.repeat(group, 1)
