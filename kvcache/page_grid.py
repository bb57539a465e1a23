"""How a document's tokens are cut into windows, which are read at once, and windows into pages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageGrid:
    """Which pages belong to which window.

    Attributes:
        total_tokens: tokens of the document.
        window_tokens: tokens of a window, a multiple of the page's; the last window may have fewer.
        page_size: tokens of a page; the last page may have fewer.
    """

    total_tokens: int
    window_tokens: int
    page_size: int

    @property
    def num_windows(self) -> int:
        """Windows of the document."""
        return -(-self.total_tokens // self.window_tokens)

    @property
    def num_pages(self) -> int:
        """Pages of the document."""
        return self.pages_for(self.total_tokens)

    def pages_for(self, tokens: int) -> int:
        """Return how many pages `tokens` rows take."""
        return -(-tokens // self.page_size)

    def tokens_of(self, windows: int) -> int:
        """Return how many tokens the first `windows` windows have."""
        return min(windows * self.window_tokens, self.total_tokens)

    def first_page(self, window: int) -> int:
        """Return the first page of a window; of the one behind the last, how many pages there are."""
        return min(window * self.window_tokens // self.page_size, self.num_pages)

    def pages_of(self, window: int) -> range:
        """Return the pages of a window."""
        return range(self.first_page(window), self.first_page(window + 1))

    def window_of(self, page: int) -> int:
        """Return the window that a page belongs to."""
        return page * self.page_size // self.window_tokens
