"""Layout as scores: what `token`, `sentence` and `recursive` cut by where chunk lengths are weighed as well.

Without a length prior these chunkers pack greedily (`ragkit.chunking.packed`), each chunk cut at the strongest boundary
within the cap. With one, every cut is worth something by the kind of its boundary, the prior says what a length is
worth, and the length-constrained search solves both together over the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ragkit.chunking.base import Chunker
from ragkit.chunking.boundaries import Boundary, boundary_offsets
from ragkit.chunking.characters import CharacterChunker, CharacterTokenizer
from ragkit.chunking.configured_prior import configured_prior
from ragkit.chunking.length_constrained import LengthPrior, Scores, UniformPrior
from ragkit.chunking.packed import PackedChunker
from ragkit.chunking.scored import BoundaryScores, ScoredChunker
from ragkit.chunking.segmenter import configured_segmenter
from ragkit.chunking.signals import LOG_ODDS
from ragkit.chunking.units import Units, sentence_units, word_units
from ragkit.config import ChunkingConfig
from ragkit.types import TextTokenizer

# Log-odds of a cut at the strongest kind of boundary that a chunker knows, the next one, and so on. Where every length
# is as good, even the strongest costs something, so that the chunks are as few as possible.
_COSTS = (-1.0, -4.0, -8.0)
# Where a prior pulls towards some length, a cut costs nothing, or lengths would come out over the target; a stronger
# kind is worth some distance from it.
_STEP = 1.0


class LayoutScorer:
    """Scores boundaries by their kind.

    Args:
        name: of the chunker.
        kinds: strongest first; every unit opens one of the last kind at least.
        pulled: whether the prior pulls towards some length.
    """

    measure = LOG_ODDS

    def __init__(self, name: str, kinds: Sequence[Boundary], *, pulled: bool) -> None:
        self.name = name
        self._kinds = tuple(kinds)
        weakest = len(kinds) - 1
        self._worth = [_STEP * (weakest - place) if pulled else _COSTS[place] for place in range(len(kinds))]
        self.fingerprint = f"layout-1:{','.join(self._kinds)}:{self._worth}"

    def boundaries(self, text: str) -> list[int]:
        """Return where units start besides those of the last kind."""
        return sorted({offset for kind in self._kinds[:-1] for offset in boundary_offsets(text, kind)})

    def score(self, texts: Sequence[str], units: Sequence[Units]) -> list[BoundaryScores]:
        """Return the scores of each text."""
        return [BoundaryScores(self._score(text, some), None) for text, some in zip(texts, units, strict=True)]

    def _score(self, text: str, units: Units) -> Scores:
        odds = np.full(len(units), self._worth[-1])
        for kind, worth in reversed(list(zip(self._kinds[:-1], self._worth[:-1], strict=True))):
            offsets = np.asarray(boundary_offsets(text, kind), dtype=np.int64)
            odds[np.isin(units.starts[:-1], offsets, assume_unique=True)] = worth
        return odds[1:]


def layout_chunker(name: str, kinds: Sequence[Boundary], config: ChunkingConfig, tokenizer: TextTokenizer) -> Chunker:
    """Return a chunker that cuts at `kinds` of boundaries, strongest first, words last, and holds the cap.

    It packs greedily, or solves for the cuts where the settings name a length prior.
    """
    prior = configured_prior(config)
    if prior is None:
        segmenter = configured_segmenter(config)
        if isinstance(tokenizer, CharacterTokenizer):
            return CharacterChunker(name, kinds, config.max_tokens, config.overlap_tokens, segmenter)
        return PackedChunker(name, kinds, tokenizer, config.max_tokens, config.overlap_tokens, segmenter=segmenter)
    return _solved_chunker(name, kinds, config, tokenizer, prior)


def _solved_chunker(
    name: str, kinds: Sequence[Boundary], config: ChunkingConfig, tokenizer: TextTokenizer, prior: LengthPrior
) -> ScoredChunker:
    # Words are units only where nothing stronger is; else sentences are, and those over the cap are cut at words.
    larger = [kind for kind in kinds if kind is not Boundary.WORD]
    scorer = LayoutScorer(name, larger or kinds, pulled=not isinstance(prior, UniformPrior))
    units = sentence_units if larger else word_units
    return ScoredChunker(scorer, config, tokenizer, prior, boundaries=scorer.boundaries, cut_units=units)
