"""Pages by all their keys, in the few directions along which the document's keys differ.

    logit(q, page) = log sum_j exp(scale * (V^T q) . (V^T (k_j - m)))     over the keys of the page

The columns of V (head_dim, rank) are the principal directions of the keys of the document's first pages, one basis for
each key head, and m is their mean, which moves all logits of a query alike and so no choice. Nothing stands for several
keys: one token that matters is found among thousands, which bounds and means of parts of a page lose. A quarter of 128
directions, in 4 bits and with their scales, takes 7% of the keys' bytes in bf16 (half of 64 directions 14%), and a
quarter of the work that all of them are.

Sources: scoring tokens by the first principal components of keys: Loki, arXiv 2406.02542; keys before RoPE are of the
lowest rank: ShadowKV, arXiv 2410.21465. Loki fits its basis offline, on a corpus of calibration, and takes single
tokens. Here the basis comes from the document itself, needs no other text, and is stored with it; one turn of the query
stands for the distance, and pages take part by the attention that all their tokens would receive.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.kernels.backend import Backend, resolve_backend
from ragkit.kernels.page_log_sums import page_log_sums
from ragkit.kernels.quantize_kv import quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kvcache.page_selector import Election, PageRows, Takes, pool_votes

_BITS = 4
_LEAST_RANK = 32
_LEAST_BLOCK = 16  # rows of a page that the kernel multiplies at once
_PAGES_AT_ONCE = 256  # that are scored together without a kernel
_EIGH = threading.Lock()  # torch loads its linear algebra when it is first used, and fails where two threads do at once


@dataclass(frozen=True, slots=True)
class LowRank:
    """Keys in a `share` of the directions of a head, at least 32 of them; all of a smaller head."""

    share: float = 0.25
    takes = Takes.BEST
    needs_received = False
    loads_sooner = False
    group_pages = 8

    @property
    def selector_id(self) -> str:
        """The selector with its share of directions."""
        return f"low-rank-{self.share:g}"

    def fit(self, rows: PageRows) -> tuple[Tensor, ...]:
        """Return the basis (kv_heads, head_dim, rank) and the mean key (kv_heads, head_dim), both fp32."""
        keys = rows.keys.flatten(0, 1).transpose(0, 1).float()  # (kv_heads, tokens, head_dim)
        mean = keys.mean(dim=1, keepdim=True)
        centred = keys - mean
        with _EIGH:
            _, directions = torch.linalg.eigh(centred.transpose(1, 2) @ centred)  # ascending
        basis = directions[:, :, -self._rank(keys.shape[2]) :].flip(2)
        return basis.contiguous(), mean.squeeze(1).contiguous()

    def summarise(self, rows: PageRows, fitted: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Return codes, scales and zeros of the keys, (pages, tokens or 1, kv_heads, rank or its bytes) each."""
        basis, mean = fitted
        pages, size = rows.keys.shape[:2]
        centred = rows.keys.flatten(0, 1).float() - mean
        along = torch.einsum("thd,hdr->thr", centred, basis).contiguous()
        parts = quantize_kv(along, bits=_BITS, token_group=size, channel_group=1)
        return tuple(part.unflatten(0, (pages, -1)) for part in parts)

    def score(self, queries: Tensor, summary: tuple[Tensor, ...], first: int, stop: int, election: Election) -> Tensor:
        """Return (groups, pages) fp32."""
        basis, _, codes, scales, zeros = summary
        along = torch.einsum("nhgd,hdr->nhgr", queries.unflatten(1, (len(basis), -1)).float(), basis).flatten(1, 2)
        some = QuantizedBlocks(codes[first:stop], scales[first:stop], zeros[first:stop], _BITS)
        if resolve_backend(queries) is Backend.TRITON and some.shape[1] >= _LEAST_BLOCK:
            return pool_votes(page_log_sums(along.to(queries.dtype), some, scale=election.scale), election)
        logits = [
            _log_sums(along * election.scale, some, slice(start, start + _PAGES_AT_ONCE), queries.dtype)
            for start in range(0, stop - first, _PAGES_AT_ONCE)
        ]
        return pool_votes(torch.cat(logits, dim=2), election)

    def _rank(self, head_dim: int) -> int:
        return min(head_dim, max(_LEAST_RANK, round(self.share * head_dim / 2) * 2))


def _log_sums(queries: Tensor, keys: QuantizedBlocks, pages: slice, dtype: torch.dtype) -> Tensor:
    """Return (queries, q_heads, pages) fp32 logits; scales go to the queries, which are fewer than a page's keys."""
    codes, scales, zeros = keys.codes[pages], keys.scales[pages, 0].float(), keys.zeros[pages, 0].float()
    numbers = torch.cat((codes & 15, codes >> 4), dim=3).to(dtype)  # whole numbers that any type holds
    of_heads = []
    for head, own in enumerate(queries.unflatten(1, (codes.shape[2], -1)).unbind(1)):
        voters = own.flatten(0, 1)
        scaled = (voters * scales[:, head, None]).to(dtype)  # (pages, voters, rank)
        products = torch.bmm(scaled, numbers[:, :, head].mT).float()
        # A softmax reads each row once where maximum, exponentials and sum would take five passes; and the zeros of a
        # page move all of its logits alike.
        logits = products[..., 0] - products.log_softmax(dim=2)[..., 0] + zeros[:, head] @ voters.T
        of_heads.append(logits.T.unflatten(0, own.shape[:2]))
    return torch.cat(of_heads, dim=1)
