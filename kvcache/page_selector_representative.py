"""Pages by the keys that were looked at most while the page was read.

    r = mean of the `count` keys of a page that received most attention,  logit(q, page) = scale * q . r

What the local window looked at is what a page is about, and later queries ask for the same: four such keys find 96.8%
of InfLLM's KV retrieval, the mean of all 84.6% (arXiv 2402.04617, table of ablations).

Source: InfLLM, arXiv 2402.04617, section 3.2. Its published code expands keys to the query heads first, so its table is
larger by the heads that share a key head (four times for Llama 3 8B), adds logits over heads, as `PageVote.SUM` does,
and counts attention from a window of 4,096 queries; here rows are looked at by the queries of their own window of
`pages.window_tokens`, as a mean over those that can see them, because sums favour early rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ragkit.kvcache.page_scoring import score_vectors
from ragkit.kvcache.page_selector import Election, PageRows, Takes, Unfitted


@dataclass(frozen=True, slots=True)
class RepresentativeKeys(Unfitted):
    """The mean of the `count` keys of each key head that received most attention."""

    count: int = 4
    takes = Takes.BEST
    needs_received = True
    loads_sooner = False
    group_pages = 1

    @property
    def selector_id(self) -> str:
        """The selector with its number of keys."""
        return f"representative-{self.count}"

    def summarise(self, rows: PageRows, fitted: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Return the means (pages, kv_heads, head_dim), in the keys' type."""
        assert rows.received is not None, "said by needs_received"
        most = rows.received.topk(min(self.count, rows.received.shape[1]), dim=1).indices  # (pages, count, kv_heads)
        chosen = rows.keys.gather(1, most.unsqueeze(3).expand(-1, -1, -1, rows.keys.shape[3]))
        return (chosen.float().mean(dim=1).to(rows.keys.dtype),)

    def score(self, queries: Tensor, summary: tuple[Tensor, ...], first: int, stop: int, election: Election) -> Tensor:
        """Return (groups, pages) fp32."""
        (means,) = summary
        return score_vectors(queries, means[first:stop].unsqueeze(1), election)
