"""What a chunker went by, boundary by boundary: the seam of previews and plots, and the kinds of boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ragkit.chunking.base import Chunker
from ragkit.chunking.boundaries import Boundary, boundary_offsets
from ragkit.chunking.length_constrained import Indices, Scores
from ragkit.chunking.outline import outline
from ragkit.chunking.tables import find_tables
from ragkit.types import Chunk, Document

LOG_ODDS = "log-odds of a cut"


@dataclass(frozen=True, slots=True)
class BoundarySignals:
    """The boundaries of one text that a chunker chose from.

    Attributes:
        measure: what `values` are, in words, with their unit; up to "of" it is a short name.
        offsets: (boundaries,) the code point that a chunk would start with, ascending.
        values: (boundaries,) the measure at each.
        threshold: the value that parts cuts from other boundaries where the cap and the prior leave it free; None
            where there is no single one.
        cut: (boundaries,) True where the text was cut. Chunks over the cap are cut again at other places.
    """

    measure: str
    offsets: Indices
    values: Scores
    threshold: float | None
    cut: NDArray[np.bool_]

    @property
    def name(self) -> str:
        """The first words of `measure`: "cosine distance", "mean loss", "log-odds"."""
        return self.measure.partition(" of ")[0]

    def value_at(self, offset: int) -> float | None:
        """Return the value of the boundary before code point `offset`, or None where there is none."""
        index = int(np.searchsorted(self.offsets, offset))
        return float(self.values[index]) if index < len(self.offsets) and self.offsets[index] == offset else None


@runtime_checkable
class SignalChunker(Chunker, Protocol):
    """A chunker that can say what it went by; `balanced`, `semantic`, `perplexity` and others are."""

    def chunk_with_signals(self, document: Document) -> tuple[list[Chunk], BoundarySignals]:
        """Return the chunks of `document`, those of `chunk`, and the boundaries that they were chosen from.

        The models run once. Errors as for `chunk`.
        """
        ...


class BoundaryKind(StrEnum):
    """What lies at a boundary, strongest first."""

    HEADING = "heading"
    TABLE_ROW = "table row"
    PARAGRAPH = "paragraph"
    LINE = "line"
    SENTENCE = "sentence"
    WORD = "word"
    INSIDE_WORD = "inside a word"


def boundary_kinds(text: str, offsets: Sequence[int]) -> list[BoundaryKind]:
    """Return the kind of each of `offsets` in `text`, the strongest that fits; work grows with the text's length."""
    places = {
        BoundaryKind.HEADING: {heading.char_start for heading in outline(text)},
        BoundaryKind.TABLE_ROW: {row for table in find_tables(text) for row in table.rows},
        BoundaryKind.PARAGRAPH: set(boundary_offsets(text, Boundary.PARAGRAPH)),
        BoundaryKind.LINE: set(boundary_offsets(text, Boundary.LINE)),
        BoundaryKind.SENTENCE: set(boundary_offsets(text, Boundary.SENTENCE)),
    }
    return [
        next((kind for kind, found in places.items() if offset in found), _inside_line(text, offset))
        for offset in offsets
    ]


def _inside_line(text: str, offset: int) -> BoundaryKind:
    around = text[max(0, offset - 1) : offset + 1]
    inside = len(around) == 2 and all(char.isalnum() for char in around)
    return BoundaryKind.INSIDE_WORD if inside else BoundaryKind.WORD
