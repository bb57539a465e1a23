"""The structural chunker: cuts at headings, then between paragraphs and table rows, then between sentences.

What holds a chunk together is the layout that the author gave the text. Headings up to `split_level` always open a
chunk; everywhere else a cut costs the more the less of a boundary it is, and the length-constrained search pays the
least. A heading stays with what follows it and the header of a table with its first row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ragkit.chunking.length_constrained import LengthPrior, Scores
from ragkit.chunking.outline import Heading, outline
from ragkit.chunking.scored import BoundaryScores, ScoredChunker
from ragkit.chunking.signals import LOG_ODDS
from ragkit.chunking.tables import find_tables
from ragkit.chunking.units import Units
from ragkit.config import ChunkingConfig
from ragkit.errors import UsageError
from ragkit.types import TextTokenizer

# Log-odds of a cut. Each kind costs more than the one before, so the cap is held by few cuts at strong places.
_SPLIT = 5.0
_HEADING, _HEADING_STEP = -1.0, 0.5  # below the split level; one step more for each level
_PARAGRAPH, _ROW, _SENTENCE = -6.0, -8.0, -30.0
_BLANK = 200  # code points of white space behind a heading that are looked past
_TORN = -100.0  # between a heading and its text, inside the header of a table


@dataclass(frozen=True, slots=True)
class StructuralOptions:
    """`split_level`: headings down to this level always open a chunk; 0 for none."""

    split_level: int = 2

    def __post_init__(self) -> None:
        if self.split_level < 0:
            raise UsageError(f"the split level of the structural chunker must be at least 0, got {self.split_level}")


class StructureScorer:
    """Scores boundaries by the kind of place that they are."""

    name = "structural"
    measure = LOG_ODDS

    def __init__(self, options: StructuralOptions) -> None:
        self._options = options
        self.fingerprint = f"structure-4:{options.split_level}"

    def boundaries(self, text: str) -> list[int]:
        """Return where headings and table rows start: units end there whatever the sentences do."""
        tables = find_tables(text)
        starts = {heading.char_start for heading in outline(text)}
        starts.update(offset for table in tables for offset in (table.char_start, *table.rows))
        return sorted(starts)

    def score(self, texts: Sequence[str], units: Sequence[Units]) -> list[BoundaryScores]:
        """Return the scores of each text."""
        scores = [self._score(text, some) for text, some in zip(texts, units, strict=True)]
        return [BoundaryScores(odds, None) for odds in scores]

    def _score(self, text: str, units: Units) -> Scores:
        odds = np.where(units.opens_paragraph, _PARAGRAPH, _SENTENCE)
        starts = units.starts[:-1]
        for table in find_tables(text):
            inside = (starts > table.char_start) & (starts < (table.rows[0] if table.rows else table.char_stop))
            odds[inside] = _TORN
            odds[np.isin(starts, table.rows[1:])] = _ROW
            odds[np.isin(starts, table.rows[:1])] = _TORN
        for heading in outline(text):
            first, last = np.searchsorted(starts, [heading.char_start, _behind(text, heading) + 1])
            if first < len(starts) and starts[first] == heading.char_start:
                odds[first] = self._heading_odds(heading)
                odds[first + 1 : last] = np.minimum(odds[first + 1 : last], _TORN)
        return odds[1:]

    def _heading_odds(self, heading: Heading) -> float:
        below = heading.level - self._options.split_level
        return _SPLIT if below <= 0 else _HEADING - _HEADING_STEP * below


def _behind(text: str, heading: Heading) -> int:
    """Return where the text behind a heading starts; the heading may share a unit with its first sentence."""
    blank = text[heading.char_stop : heading.char_stop + _BLANK]
    return heading.char_stop + len(blank) - len(blank.lstrip())


def structural_chunker(
    config: ChunkingConfig,
    tokenizer: TextTokenizer,
    options: StructuralOptions | None = None,
    prior: LengthPrior | None = None,
) -> ScoredChunker:
    """Return a chunker that cuts at the structure of the text and holds the cap."""
    scorer = StructureScorer(options or StructuralOptions())
    return ScoredChunker(scorer, config, tokenizer, prior, boundaries=scorer.boundaries, describe=True)
