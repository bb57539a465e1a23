"""The semantic chunker: cuts where neighbouring sentences have little in common.

Every sentence is embedded once. The buffers that the published splitters embed again (each sentence joined with its
neighbours) are averages of sentence vectors here: the mean of the sentences before a boundary is compared with the
mean of those behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ragkit.chunking.breakpoints import DEFAULT_AMOUNTS, BreakpointRule, check_amount, find_breakpoints
from ragkit.chunking.length_constrained import LengthPrior, Scores
from ragkit.chunking.scored import BoundaryScores, ScoredChunker
from ragkit.chunking.sentence_vectors import SentenceEmbedder, Vectors, VectorStream
from ragkit.chunking.units import Units
from ragkit.config import ChunkingConfig
from ragkit.errors import UsageError
from ragkit.types import TextTokenizer


@dataclass(frozen=True, slots=True)
class SemanticOptions:
    """Which boundaries are breakpoints.

    Attributes:
        rule: how breakpoints are told from the rest.
        amount: the rule's percentile or number of standard deviations; `DEFAULT_AMOUNTS` where it is None.
        window: sentences on each side of a boundary that are averaged.
        paragraph_log_odds: added where a paragraph starts; 0 is the published rule, which does not look at layout.
    """

    rule: BreakpointRule = BreakpointRule.PERCENTILE
    amount: float | None = None
    window: int = 3
    paragraph_log_odds: float = 0.0

    def __post_init__(self) -> None:
        check_amount(self.rule, self.threshold_amount)
        if self.window < 1:
            raise UsageError(f"the window of the semantic chunker must be at least 1 sentence, got {self.window}")

    @property
    def threshold_amount(self) -> float:
        """The amount that applies."""
        return DEFAULT_AMOUNTS[self.rule] if self.amount is None else self.amount


class SimilarityScorer:
    """Scores boundaries by the cosine distance of the sentences before and behind them."""

    name = "semantic"
    measure = "cosine distance of the sentences before and behind"

    def __init__(self, embedder: SentenceEmbedder, options: SemanticOptions) -> None:
        self._embedder = embedder
        self._options = options
        self.fingerprint = repr((embedder.embedder_id, sorted(asdict(options).items())))

    def score(self, texts: Sequence[str], units: Sequence[Units]) -> list[BoundaryScores]:
        """Return the scores of each text; the signal is the distance.

        Raises:
            ChunkingError: the embedder returned a vector that is not finite.
        """
        stream = VectorStream(self._embedder, texts, units)
        return [self._scores(block_distances(stream.take(len(some)), self._options.window)) for some in units]

    def _scores(self, distances: Scores) -> BoundaryScores:
        found = find_breakpoints(distances, self._options.rule, self._options.threshold_amount)
        by_distance = self._options.rule in (BreakpointRule.PERCENTILE, BreakpointRule.STANDARD_DEVIATION)
        return BoundaryScores(found.log_odds, distances, found.threshold if by_distance else None)


def block_distances(pieces: Iterable[Vectors], window: int) -> Scores:
    """Return (vectors - 1,) 1 - cosine between the means of up to `window` vectors before and behind each boundary.

    `pieces` are consecutive rows; no more than one piece and the rows around its edges are held.
    """
    distances: list[Scores] = []
    held: Vectors | None = None
    first = 0  # index of the first row held
    done = 1  # the next boundary: that before row `done`
    for piece in pieces:
        held = piece if held is None else np.concatenate([held, piece])
        ready = first + len(held) - window + 1
        if ready > done:
            distances.append(_distances(held, done - first, ready - first, window))
            done = ready
            keep = max(first, done - window)
            held = held[keep - first :]
            first = keep
    if held is not None and first + len(held) > done:
        distances.append(_distances(held, done - first, len(held), window))
    return np.concatenate(distances) if distances else np.zeros(0)


def _distances(rows: Vectors, start: int, stop: int, window: int) -> Scores:
    """Return the distances of the boundaries before rows `start` to `stop - 1`."""
    sums = np.zeros((len(rows) + 1, rows.shape[1]))
    np.cumsum(rows, axis=0, dtype=np.float64, out=sums[1:])
    at = np.arange(start, stop)
    left = sums[at] - sums[np.maximum(at - window, 0)]
    right = sums[np.minimum(at + window, len(rows))] - sums[at]
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosine: Scores = np.einsum("bd,bd->b", left, right) / np.maximum(norms, np.finfo(np.float64).tiny)
    return 1.0 - cosine


def semantic_chunker(
    config: ChunkingConfig,
    tokenizer: TextTokenizer,
    embedder: SentenceEmbedder,
    options: SemanticOptions | None = None,
    prior: LengthPrior | None = None,
) -> ScoredChunker:
    """Return a chunker that cuts where the similarity of neighbouring sentences breaks, and holds the cap."""
    options = options or SemanticOptions()
    scorer = SimilarityScorer(embedder, options)
    return ScoredChunker(scorer, config, tokenizer, prior, options.paragraph_log_odds)
