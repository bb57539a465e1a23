"""Which pages a pass can attend to and where they stand: fixed for all its layers, whatever they choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ragkit.config import PagePositions
from ragkit.generation.page_options import PageOptions
from ragkit.kvcache.page_selector import Takes


class MovingEnd(NamedTuple):
    """How many pages stand before a pass that a CUDA graph replays behind ever more of them.

    Attributes:
        end: (1,) int64 on the device, the pages.
        most: as many pages are looked at, and never more stand there.
    """

    end: Tensor
    most: int


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The pages before a pass: sinks up to `first`, candidates up to `stop`, the local window up to `end`.

    Attributes:
        first, stop, end: pages.
        num_found: candidates that the selector finds.
        num_chosen: those of them that are attended to.
        num_rows: rows of all pages that are attended to which hold tokens; only the last page can have others.
        start: position of the first own row.
        page_size: rows of a page.
    """

    first: int
    stop: int
    end: int
    num_found: int
    num_chosen: int
    num_rows: int
    start: int
    page_size: int

    @classmethod
    def of(cls, num_tokens: int, options: PageOptions) -> PageLayout:
        """Return the layout of a pass behind `num_tokens` tokens of a document."""
        size = options.page_size
        end = -(-num_tokens // size)
        first = min(options.sink_pages, end)
        stop = max(first, end - options.local_pages)
        chosen = found = 0 if options.selector.takes is Takes.NOTHING else stop - first
        if options.selector.takes is Takes.BEST:
            found = min(chosen, options.budget_pages * options.found_times)
            chosen = min(chosen, options.budget_pages)
        rows = (first + chosen + end - stop) * size - (-num_tokens % size)
        return cls(first, stop, end, found, chosen, rows, options.positions_before(num_tokens), size)

    @property
    def is_steady(self) -> bool:
        """Whether the layout of a pass behind more whole pages differs in `stop` and `end` alone."""
        return self.num_chosen < self.num_candidates and self.num_found < self.num_candidates

    @property
    def num_candidates(self) -> int:
        """Pages between the sinks and the local window."""
        return self.stop - self.first

    @property
    def num_listed(self) -> int:
        """Pages that are attended to."""
        return self.first + self.num_chosen + self.end - self.stop

    def listed(self, chosen: Tensor) -> Tensor:
        """Return (groups, pages) int64, all pages that are attended to, for (groups, num_chosen) chosen ones."""
        groups = len(chosen)
        sinks = torch.arange(self.first, device=chosen.device).expand(groups, -1)
        local = torch.arange(self.stop, self.end, device=chosen.device).expand(groups, -1)
        return torch.cat((sinks, chosen, local), dim=1)

    def page_positions(self, listed: Tensor, options: PageOptions) -> Tensor:
        """Return (groups or 1, pages) int64, the position of each page's first row; -1 where all rows stand at 0."""
        if options.positions is PagePositions.TRUE:
            return listed * self.page_size
        count = listed.shape[1]
        if options.positions is PagePositions.REINDEXED:
            return (torch.arange(count, device=listed.device) * self.page_size).unsqueeze(0)
        local = self.end - self.stop
        # The local window ends right before the first own row, also where its last page is not full.
        rows = self.num_rows - (count - local) * self.page_size
        at = torch.arange(local, device=listed.device) * self.page_size + self.start - rows
        remote = torch.full((count - local,), -1, dtype=torch.int64, device=listed.device)
        return torch.cat((remote, at)).unsqueeze(0)

    def row_positions(self, listed: Tensor, options: PageOptions) -> Tensor:
        """Return (groups or 1, rows) int64, the position of every row."""
        starts = self.page_positions(listed, options)
        rows = starts.unsqueeze(2) + torch.arange(self.page_size, device=listed.device)
        return torch.where(starts.unsqueeze(2) < 0, 0, rows).flatten(1)
