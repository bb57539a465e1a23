"""Pages by all their keys: what each query head would attend to if it saw the whole document.

    logit(q, page) = log sum_j exp(scale * q . k_j)     over the keys of the page

With the soft vote the score of a page is the attention that all heads together would give it, each head's weights
adding up to one. Nothing stands for the keys, so nothing is overlooked; every choice reads all of them, which is why
a choice can be kept while queries stay alike (`pages.keep_similarity`).

Source: TokenSelect, arXiv 2411.02886, section 4. It takes single tokens, here pages are taken: the weights of their
tokens are added. Its published code does not divide logits by the square root of the head's size before the softmax,
and pairs query head h with key head h % kv_heads where models pair it with h // group, so that 4 of 32 heads of Llama 3
8B meet their own keys; its selection cache lacks an argument and cannot be switched on. Here keys are kept in `bits`
bits a number: with 4 they take about a quarter of what bf16 does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.kernels.backend import Backend, resolve_backend
from ragkit.kernels.dequantize_kv import dequantize_kv
from ragkit.kernels.page_log_sums import page_log_sums
from ragkit.kernels.quantize_kv import QuantizedHeads, quantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kvcache.page_scoring import head_products
from ragkit.kvcache.page_selector import Election, PageRows, Takes, Unfitted, pool_votes

_PAGES_AT_ONCE = 256
_GROUP = 32  # tokens that share a scale in each channel, at most


@dataclass(frozen=True, slots=True)
class SoftVote(Unfitted):
    """All keys, in 8 or 4 bits."""

    bits: int = 4
    takes = Takes.BEST
    needs_received = False
    loads_sooner = False
    group_pages = 1

    @property
    def selector_id(self) -> str:
        """The selector with its bits."""
        return f"soft-vote-{self.bits}"

    def summarise(self, rows: PageRows, fitted: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Return codes, scales and zeros of the keys, (pages, tokens or groups, kv_heads, channels) each."""
        pages, size = rows.keys.shape[:2]
        heads = rows.keys.flatten(0, 1)
        parts = quantize_kv(heads, bits=self.bits, token_group=min(_GROUP, size), channel_group=1)
        return tuple(part.unflatten(0, (pages, -1)) for part in parts)

    def score(self, queries: Tensor, summary: tuple[Tensor, ...], first: int, stop: int, election: Election) -> Tensor:
        """Return (groups, pages) fp32."""
        if resolve_backend(queries) is Backend.TRITON:
            codes, scales, zeros = (part[first:stop] for part in summary)
            keys = QuantizedBlocks(codes, scales, zeros, self.bits)
            return pool_votes(page_log_sums(queries, keys, scale=election.scale), election)
        logits = []
        for start in range(first, stop, _PAGES_AT_ONCE):
            part = slice(start, min(start + _PAGES_AT_ONCE, stop))
            products = head_products(queries, self._keys(tuple(one[part] for one in summary), queries))
            logits.append((products * election.scale).unflatten(2, (part.stop - start, -1)).logsumexp(dim=3))
        return pool_votes(torch.cat(logits, dim=2), election)

    def _keys(self, summary: tuple[Tensor, ...], queries: Tensor) -> Tensor:
        """Return (tokens, kv_heads, head_dim) in the queries' type."""
        codes, scale, zero = (part.flatten(0, 1).contiguous() for part in summary)
        out = torch.empty((len(codes), codes.shape[1], queries.shape[2]), dtype=queries.dtype, device=codes.device)
        dequantize_kv(QuantizedHeads(codes, scale, zero), out, token_group=len(codes) // len(scale))
        return out
