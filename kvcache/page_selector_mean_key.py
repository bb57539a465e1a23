"""Pages by their mean key.

    logit(q, page) = scale * q . mean_j k_j

The simplest representative: a page that is about one thing has keys of one direction. A single row that matters among
64 others is diluted 64 times, which is what representatives and bounds are for: InfLLM (arXiv 2402.04617, its ablation)
lost 12 points of KV retrieval with it.

ShadowKV (arXiv 2410.21465) takes means of rotated keys, where rows 8 apart differ in phase; keys before RoPE have none,
and the query's turn stands for the distance of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.kernels.dequantize_kv import dequantize_kv
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kvcache.page_scoring import score_vectors
from ragkit.kvcache.page_selector import Election, PageRows, Takes, Unfitted


@dataclass(frozen=True, slots=True)
class MeanKey(Unfitted):
    """One mean a page and key head."""

    selector_id = "mean-key"
    takes = Takes.BEST
    needs_received = False
    loads_sooner = False
    group_pages = 1

    def summarise(self, rows: PageRows, fitted: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Return the means (pages, kv_heads, head_dim), in the keys' type."""
        return (rows.keys.float().mean(dim=1).to(rows.keys.dtype),)

    def keep(self, keys: QuantizedBlocks, pages: Tensor, parts: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        """Write the means of some pages into those of all, as `ScoresWithin` says."""
        some = keys.some(pages)
        decoded = torch.empty(some.shape, dtype=dtype, device=pages.device)
        dequantize_kv(some.heads(), decoded.flatten(0, 1), token_group=some.row_group)
        for all_means, means in zip(parts, self.summarise(PageRows(decoded)), strict=True):
            all_means.index_copy_(0, pages, means)

    def score(self, queries: Tensor, summary: tuple[Tensor, ...], first: int, stop: int, election: Election) -> Tensor:
        """Return (groups, pages) fp32."""
        (means,) = summary
        return score_vectors(queries, means[first:stop].unsqueeze(1), election)

    def score_within(
        self, queries: Tensor, summary: tuple[Tensor, ...], within: Tensor, election: Election
    ) -> Tensor:  # fmt: skip
        """Return (groups, pages) fp32, as `ScoresWithin` says."""
        (means,) = summary
        return score_vectors(queries, means.unsqueeze(1), election, within)
