"""Which pages of a long document are attended to: what a selector keeps of a page, and how it scores pages for queries.

A selector sees keys before RoPE, once, when a page is complete, and later queries that are turned to one fixed distance
from them. The keys of all pages count as standing at position 0 and every query `distance` behind them: so pages that
were never within one window compare, and neither a selector nor what it keeps knows where anything stands. Selectors
give each query head's logits of pages; how heads and queries share one choice is a `PageVote` that all of them take.
What suits one document, such as a basis of its keys, is fitted to its first pages and kept beside the rest.
They know nothing of tiers, of the engine and of how pages are attended to. Adding one is a file with a class, and a
line in `page_selectors.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ragkit.config import PageVote
from ragkit.kernels.quantized_blocks import QuantizedBlocks


class PageRows(NamedTuple):
    """Rows of some pages behind each other, of one layer.

    Attributes:
        keys: (pages, page_size, kv_heads, head_dim) before RoPE, as the codec gives them back; in the last page of a
            document that does not fill it, the last row stands again where none is.
        received: (pages, page_size, kv_heads) fp32, attention that the rows received from the queries of their own
            local window while the document was read; None where it was not kept.
    """

    keys: Tensor
    received: Tensor | None = None


class Takes(Enum):
    """What a selector takes of the pages between the sinks and the local window."""

    NOTHING = auto()
    BEST = auto()
    EVERYTHING = auto()


@dataclass(frozen=True, slots=True)
class Election:
    """How the logits of all voters, the query heads of all queries, become scores of pages.

    Attributes:
        vote: how they are pooled.
        groups: 1 where all heads of a layer share their pages, the number of key heads where only the query heads of
            one key head do.
        scale: factor that attention puts on products of queries and keys.
    """

    vote: PageVote
    groups: int
    scale: float


class PageSelector(Protocol):
    """Scores pages. Frozen and free of state: what it keeps of pages lies in `PageSummaries`, outside."""

    @property
    def selector_id(self) -> str:
        """Names the selector with everything that changes what it keeps; part of the key of stored summaries."""
        ...

    @property
    def takes(self) -> Takes:
        """Whether the best pages are taken, or all or none without being scored."""
        ...

    @property
    def needs_received(self) -> bool:
        """Whether it looks at the attention that rows received."""
        ...

    @property
    def loads_sooner(self) -> bool:
        """Whether what it keeps comes from disk sooner than it is made of keys that the device holds."""
        ...

    @property
    def group_pages(self) -> int:
        """Pages that are summarised together; what is kept of a group does not depend on other groups."""
        ...

    def fit(self, rows: PageRows) -> tuple[Tensor, ...]:
        """Return what is kept of one layer of the document as a whole, by its first pages; mostly nothing.

        Args:
            rows: the first `group_pages` pages, or all where there are fewer.
        """
        ...

    def summarise(self, rows: PageRows, fitted: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Return what is kept of one layer's pages: tensors whose first dimension follows the pages.

        Args:
            rows: at most `group_pages` pages, or a multiple of it; fewer only at the end of the document.
            fitted: what `fit` gave for the document.
        """
        ...

    def score(self, queries: Tensor, summary: tuple[Tensor, ...], first: int, stop: int, election: Election) -> Tensor:
        """Return (groups, pages) fp32: scores of the pages from `first` up to `stop`, higher is better.

        Args:
            queries: (queries, q_heads, head_dim), turned to one distance from the keys.
            summary: what `fit` gave, then what `summarise` gave of all pages, joined along the first dimension.
            first, stop: the pages that can be chosen, at least one.
            election: how voters share a choice.
        """
        ...


@runtime_checkable
class ScoresWithin(Protocol):
    """A selector for pages of which only the device knows how many there are, and which come: what CUDA graphs need."""

    def keep(self, keys: QuantizedBlocks, pages: Tensor, parts: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        """Write what `summarise` gives of some pages where it belongs.

        Args:
            keys: (blocks, page_size, kv_heads, head_dim) of all pages, page i in block i.
            pages: (pages,) int64 on the device, distinct: which pages those are.
            parts: what is kept of all pages, with room for these.
            dtype: the type that keys are decoded to.
        """
        ...

    def score_within(
        self, queries: Tensor, summary: tuple[Tensor, ...], within: Tensor, election: Election
    ) -> Tensor:  # fmt: skip
        """Return (groups, pages) fp32: scores of all pages that there is room for, -inf where none is.

        Args:
            queries: as `PageSelector.score` takes them.
            summary: what was kept of all pages, with the room behind it, in which anything may stand.
            within: (3,) int32 on the device: pages from `within[0]` up to `within[1]` are scored.
            election: how voters share a choice.
        """
        ...


class Unfitted:
    """A selector that needs to know nothing of a document before its pages."""

    __slots__ = ()

    def fit(self, rows: PageRows) -> tuple[Tensor, ...]:
        """Return nothing."""
        del rows
        return ()


def pool_votes(logits: Tensor, election: Election) -> Tensor:
    """Return (groups, pages) fp32 scores of all voters together.

    Adding softmax weights is TokenSelect's soft vote (arXiv 2411.02886, section 4.2), which took KV retrieval from 16.6
    with added logits to 86.6; InfLLM (arXiv 2402.04617) adds logits, InfiniteHiP (arXiv 2502.08910) takes the highest.

    Args:
        logits: (queries, q_heads, pages).
        election: how they are pooled.
    """
    logits = logits.unflatten(1, (election.groups, -1)).transpose(0, 1).flatten(1, 2)  # (groups, voters, pages)
    if election.vote is PageVote.SOFTMAX:
        return logits.softmax(dim=-1).sum(dim=1)
    return logits.sum(dim=1) if election.vote is PageVote.SUM else logits.amax(dim=1)
