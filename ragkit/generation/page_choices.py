"""Which pages of a document each layer attends to: the sinks, those that a selector finds, and the local window.

A selector finds pages by what it keeps of them; of `found_times` as many as are wanted those stay whose keys the
queries would attend to most. Sinks and local window are scored as well, although they need not be chosen: a head that
looks there gives little of its weight to others, and so has little say among them. What is said may go on in the next
page, so half of a page's votes count for that one as well: of a number that stands across the end of a page, heads look
at the first digit alone while they choose. How many pages are listed is the
same for every choice, and which they are stays on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ragkit.config import PageVote
from ragkit.generation.page_lists import MovingEnd, PageLayout
from ragkit.generation.page_options import PageOptions
from ragkit.generation.page_rows import PageSource
from ragkit.kernels.page_top_k import page_top_k
from ragkit.kvcache.kv_pages import KVPages
from ragkit.kvcache.page_selector import Election, ScoresWithin, Takes, pool_votes
from ragkit.kvcache.rope import RotaryTable

_VOTERS = 8  # means of neighbouring queries that choose for a whole window
_FOLLOW = 0.5  # of a page's votes that the next page has as well
_MOST_VOTERS = 64  # up to here every query of a question votes


class PageChoices:
    """The choices of all layers for passes over one document.

    Args:
        pages: the document.
        layout: which pages can be chosen.
        options: how they are.
        rotary: the rotary table.
        scale: factor on the scores.
        source: gives the keys of pages.
        for_window: whether a window of the document is read: fewer voters speak for it, and choices are not counted.
        moving: the pass is replayed where more pages than those of `layout` stand before it.

    Attributes:
        listed: (groups, pages) int32 of each layer: sinks, the pages of its last choice, and the local window.
        times_chosen: (pages of the document,) int64, how often each page was chosen.
    """

    def __init__(
        self,
        pages: KVPages,
        layout: PageLayout,
        options: PageOptions,
        rotary: RotaryTable,
        scale: float,
        source: PageSource,
        *,
        for_window: bool,
        moving: MovingEnd | None = None,
    ) -> None:
        self._layout = layout
        self._options = options
        self._source = source
        self._for_window = for_window
        device = pages.device
        specs = pages.codec.layout.layers
        self._elections = [
            Election(options.vote, spec.num_kv_heads if options.per_key_head else 1, scale) for spec in specs
        ]
        # Logits, whose sums and maxima are of either sign, cannot be shared.
        self._follow = _FOLLOW if options.vote is PageVote.SOFTMAX else 0.0
        is_scored = options.selector.takes is Takes.BEST and layout.num_chosen < layout.num_candidates
        self._summaries = pages.summaries(options.selector) if is_scored else None
        everything = torch.cat([
            torch.arange(layout.first + layout.num_chosen, dtype=torch.int32, device=device),
            torch.arange(layout.stop, layout.end, dtype=torch.int32, device=device),
        ]).unsqueeze(0)  # fmt: skip
        self.listed = [everything] * len(specs)
        self.times_chosen = torch.zeros(max(1, layout.end), dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        # Pages that compete among all, and places that do among those that were found.
        self._competing = _bounds(layout.first, layout.stop, layout.end, device)
        last = layout.first + layout.num_found
        self._of_found = _bounds(layout.first, last, last + layout.end - layout.stop, device)
        self._moving = moving
        if moving is not None:
            assert layout.is_steady, "as is asked before"
            local = layout.end - layout.stop
            self._all = _bounds(0, 0, 0, device)
            self._from_end = torch.tensor([[0, 0, 0], [layout.first, -local, 0]], device=device)
            self._of_end = torch.tensor([[0, 1, 1], [0, 1, 1]], device=device)
        # Queries as they stand while pages are scored, all at one distance.
        cos, sin = (part[options.score_distance] for part in (rotary.cos, rotary.sin))
        self._turn = torch.stack((torch.cat((cos, cos)), torch.cat((-sin, sin))))

    def chosen(self, layer: int) -> Tensor:
        """Return (groups, num_chosen) int64, the pages that the layer's last choice found."""
        first = self._layout.first
        return self.listed[layer][:, first : first + self._layout.num_chosen].long()

    def move(self) -> None:
        """Look on the device where the pages end now, for the pass that begins; nothing where they do not move."""
        if self._moving is not None:
            bounds = (self._from_end + self._of_end * self._moving.end).int()
            self._all, self._competing = bounds[0], bounds[1]

    def choose(self, layer: int, queries: Tensor) -> Tensor:
        """Return the new list of a layer, for the queries of a pass (tokens, q_heads, head_dim), not turned yet."""
        options, layout = self._options, self._layout
        if self._summaries is not None:
            if layer % options.layer_interval:
                self.listed[layer] = self.listed[layer - 1]
                return self.listed[layer]
            turned = self._turned(_voters(queries, _VOTERS if self._for_window else _MOST_VOTERS))
            election = self._elections[layer]
            scores = self._scores(layer, turned, election)
            count = layout.num_listed - layout.num_chosen + layout.num_found
            listed, _ = page_top_k(
                scores.contiguous(), count, bounds=self._competing, keep_rest=True, follow=self._follow
            )
            is_enough = layout.num_found == layout.num_chosen
            self.listed[layer] = listed if is_enough else self._best_of(layer, turned, listed)
        if not self._for_window:
            flat = self.listed[layer][:, layout.first : layout.first + layout.num_chosen].flatten()
            self.times_chosen.index_add_(0, flat, self._one.expand(len(flat)))
        return self.listed[layer]

    def _scores(self, layer: int, turned: Tensor, election: Election) -> Tensor:
        """Return (groups, pages) fp32, the selector's scores of all pages."""
        selector, summaries, moving = self._options.selector, self._summaries, self._moving
        assert summaries is not None, "as asked"
        if moving is None:
            return selector.score(turned, summaries.of(layer), 0, self._layout.end, election)
        assert isinstance(selector, ScoresWithin), "as asked"
        return selector.score_within(turned, summaries.with_room(layer, moving.most), self._all, election)

    def _best_of(self, layer: int, turned: Tensor, listed: Tensor) -> Tensor:
        """Return the list of those pages of `listed` that the voters would attend to most."""
        election = self._elections[layer]
        logits = self._source.log_sums(layer, turned, listed, election.scale)
        scores = pool_votes(logits, election).contiguous()
        best, _ = page_top_k(
            scores, self._layout.num_listed, bounds=self._of_found, keep_rest=True, follow=self._follow, listed=listed
        )
        return listed.gather(1, best.long())

    def _turned(self, queries: Tensor) -> Tensor:
        if self._turn.dtype != queries.dtype:
            self._turn = self._turn.to(queries.dtype)  # once, and not in every layer
        cos, sin = self._turn
        return torch.addcmul(queries * cos, queries.roll(queries.shape[2] // 2, dims=2), sin)


def _voters(queries: Tensor, most: int) -> Tensor:
    """Return the queries that choose: all of a short pass, else means of neighbours."""
    if len(queries) <= most:
        return queries
    if len(queries) % most == 0:
        joined: Tensor = queries.unflatten(0, (most, -1))
        return joined.mean(dim=1, dtype=torch.float32).to(queries.dtype)
    parts = torch.arange(len(queries), device=queries.device) * most // len(queries)
    means = queries.new_zeros((most, *queries.shape[1:]), dtype=torch.float32).index_add_(0, parts, queries.float())
    counts = torch.zeros(most, device=queries.device).index_add_(
        0, parts, torch.ones(len(queries), device=parts.device)
    )
    return (means / counts.view(-1, 1, 1)).to(queries.dtype)


def _bounds(first: int, last: int, end: int, device: torch.device) -> Tensor:
    """Return (3,) int32, filled on the device: a copy from the host might wait for it."""
    bounds = torch.empty(3, dtype=torch.int32, device=device)
    for place, value in enumerate((first, last, end)):
        bounds[place].fill_(value)
    return bounds
