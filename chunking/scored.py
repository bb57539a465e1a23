"""The chunker behind every chunker that scores boundaries: they differ in where the scores come from.

A scorer says of every boundary between two sentences how likely a chunk ends there; the length-constrained search
(`ragkit.chunking.length_constrained`) then finds the best cuts that hold the cap, and `Assembler` takes the true
counts. So every such chunker keeps every character and holds the cap, whatever its scorer says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ragkit.chunking.assembly import Assembler, Span
from ragkit.chunking.configured_prior import configured_prior
from ragkit.chunking.length_constrained import Indices, LengthPrior, Scores, UniformPrior, best_cuts
from ragkit.chunking.metadata import with_metadata
from ragkit.chunking.segmenter import configured_segmenter
from ragkit.chunking.signals import BoundarySignals
from ragkit.chunking.units import CutUnits, Units, sentence_units
from ragkit.chunking.words import WordCounter
from ragkit.config import ChunkingConfig
from ragkit.types import Chunk, Document, TextTokenizer

_RULES_VERSION = 1  # raised when the cuts change
_INSIDE_SENTENCE = -50.0  # log-odds of a cut inside a sentence: only where the cap leaves nothing else


@dataclass(frozen=True, slots=True)
class BoundaryScores:
    """What a scorer says of the boundaries before units 1, 2, ... of one text.

    Attributes:
        log_odds: (units - 1,) log P - log(1 - P) that a chunk ends there; above 0 means cut.
        signal: (units - 1,) what the odds were made from, in the scorer's own measure; None where there is nothing
            but the odds.
        threshold: the value of `signal` at which the odds are even, where there is one.
    """

    log_odds: Scores
    signal: Scores | None
    threshold: float | None = None


class BoundaryScorer(Protocol):
    """Scores the boundaries between the units of texts."""

    @property
    def name(self) -> str:
        """The name that `--chunker` takes."""
        ...

    @property
    def fingerprint(self) -> str:
        """Everything that changes the scores, models included."""
        ...

    @property
    def measure(self) -> str:
        """What the signal is, in words, with its unit; `LOG_ODDS` where there is none."""
        ...

    def score(self, texts: Sequence[str], units: Sequence[Units]) -> list[BoundaryScores]:
        """Return the scores of each text; texts given together may share batches, never information."""
        ...


class ScoredChunker:
    """Cuts at the boundaries that `scorer` likes best, under a hard cap.

    Args:
        scorer: where the scores come from.
        config: cap, overlap and length prior. An overlap repeats whole units before the cut, inside the cap.
        tokenizer: the generator's, which the cap counts in.
        prior: how welcome a chunk length is where `config` names no prior; every length up to the cap if left out.
        paragraph_log_odds: added to the log-odds of boundaries where a paragraph starts.
        boundaries: offsets of a text, ascending, where a unit starts even inside a sentence.
        cut_units: what the boundaries lie between; sentences where it is left out.
        repeat_sentence: the last sentence of a chunk opens the next one too.
        describe: the chunks' metadata hold what `ragkit.chunking.metadata` finds.
    """

    def __init__(
        self,
        scorer: BoundaryScorer,
        config: ChunkingConfig,
        tokenizer: TextTokenizer,
        prior: LengthPrior | None = None,
        paragraph_log_odds: float = 0.0,
        boundaries: Callable[[str], Sequence[int]] | None = None,
        cut_units: CutUnits = sentence_units,
        *,
        repeat_sentence: bool = False,
        describe: bool = False,
    ) -> None:
        self._scorer = scorer
        self._max_tokens = config.max_tokens
        self._overlap_tokens = config.overlap_tokens
        self._prior = configured_prior(config) or prior or UniformPrior()
        self._paragraph_log_odds = paragraph_log_odds
        self._boundaries = boundaries
        self._cut_units = cut_units
        self._segmenter = configured_segmenter(config)
        self._repeat_sentence = repeat_sentence
        self._describe = describe
        self._counter = WordCounter(tokenizer)
        self._assembler = Assembler(tokenizer, self._counter, config.max_tokens)
        rules = [scorer.name, _RULES_VERSION, config.max_tokens, config.overlap_tokens, tokenizer.tokenizer_id]
        rules += [scorer.fingerprint, repr(self._prior), paragraph_log_odds, repeat_sentence]
        if cut_units is not sentence_units:
            rules.append(cut_units.__name__)
        if self._segmenter.fingerprint:
            rules.append(self._segmenter.fingerprint)
        self._fingerprint = hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name that `--chunker` takes."""
        return self._scorer.name

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes the cuts, the tokenizer and the scorer's models included."""
        return self._fingerprint

    def chunk(self, document: Document) -> list[Chunk]:
        """Return the chunks of `document`, in order.

        Raises:
            ChunkingError: a single code point has more tokens than the cap, or a score is NaN.
        """
        return self.chunk_many([document])[0]

    def chunk_many(self, documents: Sequence[Document]) -> list[list[Chunk]]:
        """Return the chunks of each document, the same as `chunk` one by one; scorers fill their batches better."""
        units = [self._units(document) for document in documents]
        scores = self._scorer.score([document.text for document in documents], units)
        return [
            self._chunks(document, self._spans(some, self._cuts(some, given)))
            for document, some, given in zip(documents, units, scores, strict=True)
        ]

    def chunk_with_signals(self, document: Document) -> tuple[list[Chunk], BoundarySignals]:
        """Return the chunks of `document` and the boundaries between its units, with what the scorer says of them."""
        units = self._units(document)
        scores = self._scorer.score([document.text], [units])[0]
        cuts = self._cuts(units, scores)
        cut = np.zeros(len(units), dtype=np.bool_)
        cut[cuts] = True
        signal, threshold = scores.signal, scores.threshold
        if signal is None:
            signal, threshold = self._odds(units, scores), 0.0
        signals = BoundarySignals(self._scorer.measure, units.starts[1:-1], signal, threshold, cut[1:])
        return self._chunks(document, self._spans(units, cuts)), signals

    def _units(self, document: Document) -> Units:
        extra = self._boundaries(document.text) if self._boundaries else ()
        return self._cut_units(document.text, self._counter, self._room, extra, self._segmenter)

    @property
    def _room(self) -> int:
        """The tokens of a chunk without its overlap."""
        return self._max_tokens - self._overlap_tokens

    def _cuts(self, units: Units, scores: BoundaryScores) -> Indices:
        after = units.tokens_after
        if self._repeat_sentence and len(units):
            after = np.append(after[:1], after[:-1])
        return best_cuts(self._odds(units, scores), units.tokens_before, after, self._room, self._prior)

    def _odds(self, units: Units, scores: BoundaryScores) -> Scores:
        """Return the log-odds of each boundary, the layout's share included."""
        odds = scores.log_odds + self._paragraph_log_odds * units.opens_paragraph[1:]
        return np.where(units.opens_sentence[1:], odds, np.minimum(odds, 0) + _INSIDE_SENTENCE)

    def _spans(self, units: Units, cuts: Indices) -> list[Span]:
        if not self._repeat_sentence:
            return units.spans(cuts, self._overlap_tokens)
        spans = units.spans(cuts)
        # A chunk of one sentence is not repeated as a whole: every chunk starts behind the start of the one before.
        opened = np.maximum(cuts - 1, np.append(0, cuts[:-1]) + 1) if len(cuts) else cuts
        starts = units.starts[np.minimum(opened, cuts)].tolist()
        return spans[:1] + [(start, stop) for start, (_, stop) in zip(starts, spans[1:], strict=True)]

    def _chunks(self, document: Document, spans: list[Span]) -> list[Chunk]:
        chunks = list(self._assembler.chunks(document, self._assembler.counted(document, spans)))
        return with_metadata(document, chunks) if self._describe else chunks
