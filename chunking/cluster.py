"""The cluster chunker: the cuts that keep the most similarity inside the chunks.

The objective is that of Chroma's ClusterSemanticChunker: small pieces of text are embedded, the mean similarity of all
pairs is subtracted from every pair, and a dynamic programme finds the blocks under the cap with the largest sum of
what is left inside them. There the similarity of every pair is held, which is quadratic in the text. Here only the
pairs that one chunk can hold are, and the mean of all pairs comes from the sum of the vectors:
sum over i != j of e_i . e_j = |sum e_i|^2 - sum |e_i|^2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ragkit.chunking.assembly import Assembler
from ragkit.chunking.configured_prior import configured_prior
from ragkit.chunking.length_constrained import Indices, LengthPrior, Scores, first_starts, viterbi
from ragkit.chunking.segmenter import configured_segmenter
from ragkit.chunking.sentence_vectors import SentenceEmbedder, Vectors, VectorStream
from ragkit.chunking.signals import BoundarySignals
from ragkit.chunking.units import Units, packed_units
from ragkit.chunking.words import WordCounter
from ragkit.config import ChunkingConfig
from ragkit.errors import UsageError
from ragkit.types import Chunk, Document, TextTokenizer

_RULES_VERSION = 1  # raised when the cuts change
_MEASURE = "cosine similarity of the pieces before and behind"


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """`piece_tokens`: the cap of the pieces that are embedded, in the generator's tokens."""

    piece_tokens: int = 50

    def __post_init__(self) -> None:
        if self.piece_tokens < 1:
            raise UsageError(f"the pieces of the cluster chunker need at least 1 token, got {self.piece_tokens}")


class ClusterChunker:
    """Cuts so that the pieces of a chunk are more alike than pieces are on average, under a hard cap."""

    name = "cluster"

    def __init__(
        self,
        config: ChunkingConfig,
        tokenizer: TextTokenizer,
        embedder: SentenceEmbedder,
        options: ClusterOptions | None = None,
    ) -> None:
        options = options or ClusterOptions()
        self._embedder = embedder
        self._overlap_tokens = config.overlap_tokens
        self._room = config.max_tokens - config.overlap_tokens
        self._piece_tokens = min(options.piece_tokens, self._room)
        self._prior = configured_prior(config)
        self._segmenter = configured_segmenter(config)
        self._counter = WordCounter(tokenizer)
        self._assembler = Assembler(tokenizer, self._counter, config.max_tokens)
        rules = [self.name, _RULES_VERSION, config.max_tokens, config.overlap_tokens, tokenizer.tokenizer_id]
        rules += [embedder.embedder_id, options.piece_tokens, *([repr(self._prior)] if self._prior else [])]
        rules += [self._segmenter.fingerprint] if self._segmenter.fingerprint else []
        self._fingerprint = hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the cuts, tokenizer and embedder included."""
        return self._fingerprint

    def chunk(self, document: Document) -> list[Chunk]:
        """Return the chunks of `document`, in order.

        Raises:
            ChunkingError: a single code point has more tokens than the cap, or the embedder returned a vector that
                is not finite.
        """
        return self.chunk_with_signals(document)[0]

    def chunk_with_signals(self, document: Document) -> tuple[list[Chunk], BoundarySignals]:
        """Return the chunks of `document` and the boundaries between its pieces; the threshold is the mean similarity.

        A boundary between pieces that no chunk can hold together has the mean as its value.
        """
        units = packed_units(document.text, self._counter, self._piece_tokens, self._segmenter)
        cuts, similarity, mean = self._cuts(document.text, units)
        cut = np.zeros(len(units), dtype=np.bool_)
        cut[cuts] = True
        spans = units.spans(cuts, self._overlap_tokens)
        chunks = list(self._assembler.chunks(document, self._assembler.counted(document, spans)))
        return chunks, BoundarySignals(_MEASURE, units.starts[1:-1], similarity, mean, cut[1:])

    def _cuts(self, text: str, units: Units) -> tuple[Indices, Scores, float]:
        """Return the units that open a chunk, the similarity across each boundary, and the mean of all pairs."""
        if len(units) < 2:
            return np.zeros(0, dtype=np.int64), np.zeros(max(0, len(units) - 1)), 0.0
        first = first_starts(units.tokens_before, units.tokens_after, self._room)
        pieces = VectorStream(self._embedder, [text], [units]).take(len(units))
        band, mean = banded_similarity(pieces, first)
        across = np.array([float(row[-1]) if len(row) else mean for row in band[1:]])
        rewards = _rewards(band, first, mean)
        if self._prior is not None:
            rewards = _with_prior(rewards, units, first, self._prior)
        return viterbi(first, rewards), across, mean


def banded_similarity(pieces: Iterable[Vectors], first: Indices) -> tuple[list[Vectors], float]:
    """Return, for every vector b, its inner products with the vectors first[b] to b - 1, and the mean of all pairs.

    Args:
        pieces: consecutive rows; only those that a later one still needs are held.
        first: (vectors,) ascending.
    """
    band: list[Vectors] = []
    held: Vectors | None = None
    begin = done = 0  # index of the first row held and of the next row to compare
    total: Scores | float = 0.0
    squares = 0.0
    for piece in pieces:
        held = piece if held is None else np.concatenate([held, piece])
        exact = piece.astype(np.float64)
        total = total + exact.sum(axis=0)
        squares += float(np.square(exact).sum())
        for row in range(done, begin + len(held)):
            band.append(held[first[row] - begin : row - begin] @ held[row - begin])
        done = begin + len(held)
        keep = int(first[done]) if done < len(first) else done
        held = held[keep - begin :]
        begin = keep
    pairs = len(first) * (len(first) - 1)
    return band, (float(np.dot(total, total)) - squares) / pairs if pairs else 0.0


def _with_prior(rewards: Iterable[Scores], units: Units, first: Indices, prior: LengthPrior) -> Iterator[Scores]:
    """Yield the rewards with the log prior of each chunk's length added."""
    before, after = units.tokens_before, units.tokens_after
    for last, (row, begin) in enumerate(zip(rewards, first.tolist(), strict=True)):
        yield row + prior.log_prior(before[last] - after[begin : last + 1])


def _rewards(band: list[Vectors], first: Indices, mean: float) -> Iterator[Scores]:
    """Yield for every piece b the rewards of the chunks that open with first[b], ..., b and end with b."""
    previous: Scores = np.zeros(0)
    start = 0
    for row, begin in zip(band, first.tolist(), strict=True):
        # A chunk that ends one piece later gains twice (both halves of the matrix) what the piece shares with it.
        shared = 2.0 * (row.astype(np.float64) - mean)
        previous = np.append(previous[begin - start :] + np.cumsum(shared[::-1])[::-1], 0.0)
        start = begin
        yield previous
