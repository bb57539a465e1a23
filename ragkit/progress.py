"""What long work tells whoever watches. The library never prints; the command line draws bars from this."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the advance of one long job. Calls come from one thread."""

    def start(self, total_documents: int, total_bytes: int, unit: str = "documents") -> None:
        """Say how much work there is, and what it is counted in; a second call begins the next stage."""
        ...

    def advance(self, documents: int = 0, bytes: int = 0, tokens: int = 0, hits: int = 0, misses: int = 0) -> None:
        """Say how much more is done: sources (or other units), bytes, tokens; chunks whose KV was found or was not."""
        ...

    def message(self, text: str) -> None:
        """Show one line, a warning for instance."""
        ...

    def close(self) -> None:
        """End the display, also after a failure."""
        ...


class Silent:
    """A `Progress` that shows nothing."""

    def start(self, total_documents: int, total_bytes: int, unit: str = "documents") -> None:
        """Ignore the totals."""

    def advance(self, documents: int = 0, bytes: int = 0, tokens: int = 0, hits: int = 0, misses: int = 0) -> None:
        """Ignore the advance."""

    def message(self, text: str) -> None:
        """Ignore the line."""

    def close(self) -> None:
        """Nothing to end."""
