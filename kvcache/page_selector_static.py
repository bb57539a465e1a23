"""The two selectors that look at nothing: all pages, and none beyond the sinks and the local window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ragkit.kvcache.page_selector import Election, PageRows, Takes, Unfitted


@dataclass(frozen=True, slots=True)
class EveryPage(Unfitted):
    """All pages: the exact twin of every selector. Positions lie within the window or the request is refused."""

    selector_id = "everything"
    takes = Takes.EVERYTHING
    needs_received = False
    loads_sooner = False
    group_pages = 1

    def summarise(self, rows: PageRows, fitted: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Return nothing."""
        return ()

    def score(self, queries: Tensor, summary: tuple[Tensor, ...], first: int, stop: int, election: Election) -> Tensor:
        """Return equal scores; nobody asks."""
        return torch.zeros((election.groups, stop - first), device=queries.device)


@dataclass(frozen=True, slots=True)
class SinksAndWindow(Unfitted):
    """No page beside the first ones and the last ones: the floor that retrieval must be better than.

    Attention falls on the first tokens of a sequence whatever they say, so models that keep those and a local window
    stay fluent at any length, and know nothing of what lies between.
    Sources: LM-Infinite, arXiv 2308.16137; StreamingLLM, arXiv 2309.17453.
    """

    selector_id = "window"
    takes = Takes.NOTHING
    needs_received = False
    loads_sooner = False
    group_pages = 1

    def summarise(self, rows: PageRows, fitted: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Return nothing."""
        return ()

    def score(self, queries: Tensor, summary: tuple[Tensor, ...], first: int, stop: int, election: Election) -> Tensor:
        """Return equal scores; nobody asks."""
        return torch.zeros((election.groups, stop - first), device=queries.device)
