"""Pages by the highest product that one of their keys could have: bounds of each channel over parts of a page.

    logit(q, page) = scale * max over parts of  sum_d max(q_d * lower_part,d , q_d * upper_part,d)

Whatever the query, no key of a page scores higher than that, so a page with one row that matters is not overlooked as
it is by its mean. Bounds of a whole page of 64 are too loose, and attention over pages of 16 is too slow, so bounds are
kept of parts of 16 in pages of 64: a budget of 3,072 tokens then finds what flat bounds of 64 never did.

Sources: Quest, arXiv 2406.10774, section 3.3; in two sizes, LServe, arXiv 2502.14866, section 3.5. Both keep bounds of
rotated keys: within a part the fast channels turn through all their phases and their bounds say nothing. Keys before
RoPE stand still, which makes the bounds tighter; the query's turn stands for the distance. Quest's published kernels
size their buffers for 131,072 tokens and take as many key heads as query heads; here each key head's bounds serve the
query heads that share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.kernels.page_bounds import page_bounds
from ragkit.kernels.page_scores import KeyBounds
from ragkit.kernels.quantized_blocks import QuantizedBlocks
from ragkit.kvcache.page_scoring import score_bounds
from ragkit.kvcache.page_selector import Election, PageRows, Takes, Unfitted

_ROUNDING = 2.0**-8  # twice half a unit in the last place of bf16, as a share of a number


@dataclass(frozen=True, slots=True)
class MinMax(Unfitted):
    """Bounds of parts of `part_tokens` rows; of whole pages where those are smaller."""

    part_tokens: int = 16
    takes = Takes.BEST
    needs_received = False
    loads_sooner = False
    group_pages = 1

    @property
    def selector_id(self) -> str:
        """The selector with the size of its parts."""
        return f"min-max-{self.part_tokens}"

    def summarise(self, rows: PageRows, fitted: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Return lowest and highest numbers (pages, parts, kv_heads, head_dim), in the keys' type; bf16 for fp32."""
        size = min(self.part_tokens, rows.keys.shape[1])
        parts = rows.keys.unflatten(1, (-1, size))
        lower, upper = parts.amin(dim=2), parts.amax(dim=2)
        if lower.dtype != torch.float32:
            return lower, upper
        # Half the memory of a million tokens counts. Moved by twice what rounding can move them, bounds stay bounds.
        return (lower - lower.abs() * _ROUNDING).bfloat16(), (upper + upper.abs() * _ROUNDING).bfloat16()

    def keep(self, keys: QuantizedBlocks, pages: Tensor, parts: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        """Write the bounds of some pages into those of all, as `ScoresWithin` says."""
        page_bounds(keys, pages, KeyBounds(*parts), margin=_ROUNDING if dtype == torch.float32 else 0.0)

    def score(self, queries: Tensor, summary: tuple[Tensor, ...], first: int, stop: int, election: Election) -> Tensor:
        """Return (groups, pages) fp32."""
        lower, upper = summary
        return score_bounds(queries, KeyBounds(lower[first:stop], upper[first:stop]), election)

    def score_within(
        self, queries: Tensor, summary: tuple[Tensor, ...], within: Tensor, election: Election
    ) -> Tensor:  # fmt: skip
        """Return (groups, pages) fp32, as `ScoresWithin` says."""
        return score_bounds(queries, KeyBounds(*summary), election, within)
