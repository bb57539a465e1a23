"""What one step of a batch computes, as the scheduler says and the run carries out."""

from __future__ import annotations

from dataclasses import dataclass, field

from ragkit.generation.batch_entries import Entry, RequestEntry


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one prefill: `start` up to `stop` of `entry.to_compute`."""

    entry: Entry
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the prefill ends with it."""
        return self.stop == self.entry.to_compute


@dataclass(slots=True)
class BatchStep:
    """What one step computes.

    Attributes:
        started: what gets its blocks now, common beginnings before those that list them; not who has a strategy.
        decodes: requests that get a token, in the order in which they were let in.
        pieces: pieces of prefills; a common beginning comes before those that list it.
        by_strategy: requests that a strategy prefills, each in one go, before the rest of the step.
        drafts: rows of drafts that are verified beside the tokens that decode; only where nothing else is done.
        refused: requests that there is no room for although nothing else runs.
    """

    started: list[Entry] = field(default_factory=list)
    decodes: list[RequestEntry] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    by_strategy: list[RequestEntry] = field(default_factory=list)
    drafts: dict[RequestEntry, int] = field(default_factory=dict)
    refused: list[RequestEntry] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that count against the budget."""
        return (
            len(self.decodes)
            + sum(self.drafts.values())
            + sum(piece.stop - piece.start for piece in self.pieces)
            + sum(entry.cost for entry in self.by_strategy)
        )
