"""How a paged document is read and asked about, in pages; and what of that changes the numbers of its KV."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ragkit.config import PagePositions, PagesConfig, PageVote
from ragkit.errors import GenerationError
from ragkit.kvcache.page_selector import PageSelector, Takes
from ragkit.kvcache.page_selectors import make_page_selector

READING_VERSION = 2  # raised where the same settings come to give other numbers


@dataclass(frozen=True, slots=True)
class PageOptions:
    """What every pass over a paged document attends to.

    Attributes:
        selector: finds the pages between the first and the last ones.
        page_size: tokens of a page.
        sink_pages, local_pages: first pages and last ones, which are always attended to.
        budget_pages: most pages between them that are attended to.
        found_times: the selector finds so many times as many, of which those stay that queries would attend to most.
        window_tokens: tokens that are read in one pass.
        vote: how query heads share one choice.
        per_key_head: whether each key head chooses for itself.
        positions: where the pages stand for the model.
        interval: tokens of the answer that share one choice.
        layer_interval: layers that share one choice.
        keep_similarity: cosine of the queries with those that made a choice, from which on an answer keeps it; from 1
            on it never does.
    """

    selector: PageSelector
    page_size: int = 64
    sink_pages: int = 2
    local_pages: int = 16
    budget_pages: int = 32
    found_times: int = 1
    window_tokens: int = 512
    vote: PageVote = PageVote.SOFTMAX
    per_key_head: bool = False
    positions: PagePositions = PagePositions.REINDEXED
    interval: int = 4
    layer_interval: int = 1
    keep_similarity: float = 1.0

    @classmethod
    def of(cls, config: PagesConfig, *, reading: bool = False) -> PageOptions:
        """Return the options that the settings ask for: of windows while a document is read, or of questions."""
        return cls(
            selector=make_page_selector(config.reading_selector if reading else config.selector),
            page_size=config.page_tokens,
            sink_pages=config.sink_tokens // config.page_tokens,
            local_pages=config.local_tokens // config.page_tokens,
            budget_pages=config.budget_tokens // config.page_tokens,
            found_times=config.reading_found_times if reading else config.found_times,
            window_tokens=config.window_tokens,
            vote=config.vote,
            per_key_head=config.per_key_head,
            positions=config.positions,
            interval=config.interval,
            layer_interval=config.layer_interval,
            keep_similarity=config.keep_similarity,
        )

    @property
    def local_tokens(self) -> int:
        """Tokens of the local window."""
        return self.local_pages * self.page_size

    @property
    def score_distance(self) -> int:
        """How far behind every page a query counts as standing while pages are scored: as near as one can be found."""
        return self.local_tokens

    @property
    def reading_id(self) -> str:
        """Names everything that changes the KV of a document beside the model, its tokens and the codec."""
        return json.dumps([
            READING_VERSION, self.selector.selector_id, self.page_size, self.sink_pages, self.local_pages,
            self.budget_pages, self.found_times, self.window_tokens, str(self.vote), self.per_key_head,
            str(self.positions), self.layer_interval,
        ])  # fmt: skip

    def pages_at_once(self, num_pages: int) -> int:
        """Return how many of `num_pages` pages one layer attends to at once, with one choice for all key heads."""
        around = min(self.sink_pages + self.local_pages, num_pages)
        if self.selector.takes is Takes.NOTHING:
            return around
        if self.selector.takes is Takes.EVERYTHING:
            return num_pages
        return min(around + self.budget_pages, num_pages)

    def pages_needed(self, num_pages: int, kv_heads: int = 1) -> int:
        """Return how many of `num_pages` pages have to be there decoded at once: also those that are only looked at.

        Where key heads choose for themselves, each of the `kv_heads` may look at others.
        """
        if self.selector.takes is not Takes.BEST:
            return self.pages_at_once(num_pages)
        found = self.budget_pages * self.found_times * (kv_heads if self.per_key_head else 1)
        return min(self.sink_pages + self.local_pages + found, num_pages)

    def positions_before(self, num_tokens: int) -> int:
        """Return how many positions are in use before the tokens of a pass over `num_tokens` tokens, at most."""
        if self.positions is PagePositions.TRUE:
            return num_tokens
        if self.positions is PagePositions.CLAMPED:
            return self.local_tokens
        num_pages = -(-num_tokens // self.page_size)
        return self.pages_at_once(num_pages) * self.page_size - (-num_tokens % self.page_size)

    def require_room(self, num_tokens: int, own_tokens: int, max_context: int) -> None:
        """Raise `GenerationError` where a pass over `num_tokens` would leave the window that the model was trained on.

        Args:
            num_tokens: tokens of the document.
            own_tokens: tokens of a window, or of question and answer.
            max_context: the model's window.
        """
        most = self.positions_before(num_tokens) + own_tokens
        if most > max_context:
            raise GenerationError(
                f"{most:,} positions would be in use at once ({own_tokens:,} of them for the tokens of one pass), and "
                f"the model's window has {max_context:,}: lower pages.budget_tokens, pages.local_tokens or "
                "pages.window_tokens, or take another pages.selector (for windows pages.reading_selector) or "
                "pages.positions"
            )
