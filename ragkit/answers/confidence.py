"""Whether the retrieved chunks hold an answer: a logistic model of three numbers that retrieval gives for free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ragkit.answers.base import Confidence, RankedChunk
from ragkit.answers.evidence import coverage, gather_evidence
from ragkit.answers.terms import terms
from ragkit.config import AnswerConfig
from ragkit.retrieval.base import Embedder

SIGNAL_NAMES = ("dense", "sentence", "chunk")
_COMPARED_CHUNKS = 3  # chunks that are embedded where the search was by words alone


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known about one question.

    Attributes:
        dense: best cosine similarity of the question and a chunk.
        sentence: largest share of the question's content words, weighted by rarity, that one sentence holds.
        chunk: the same for one chunk.
    """

    dense: float
    sentence: float
    chunk: float


@dataclass(frozen=True, slots=True)
class ConfidenceModel:
    """`score = 1 / (1 + exp(-(bias + weights . signals)))`; `benchmarks/answer_quality.py --fit` prints it."""

    bias: float
    dense: float
    sentence: float
    chunk: float

    def probability(self, signals: Signals) -> float:
        """Return the probability that an answer is there."""
        logit = self.bias + self.dense * signals.dense + self.sentence * signals.sentence + self.chunk * signals.chunk
        return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, logit))))


MODEL = ConfidenceModel(bias=-10.61, dense=16.3, sentence=5.37, chunk=3.54)


def judge(question: str, hits: Sequence[RankedChunk], embedder: Embedder, config: AnswerConfig) -> Confidence:
    """Return whether `hits`, best first, hold an answer to `question`, and how sure that is.

    Nothing is embedded unless the search was by words alone.
    """
    if not hits:
        return Confidence(False, 0.0, config.found_threshold)
    score = MODEL.probability(signals_of(question, hits, embedder))
    return Confidence(score >= config.found_threshold, score, config.found_threshold)


def signals_of(question: str, hits: Sequence[RankedChunk], embedder: Embedder) -> Signals:
    """Return the signals of `question` and its hits; there must be hits."""
    evidence = gather_evidence(question, None, hits)
    asked = list(dict.fromkeys(term.stem for term in terms(question)))
    by_hit: list[set[str]] = [set() for _ in hits]
    for sentence in evidence.sentences:
        by_hit[sentence.hit].update(term.stem for term in sentence.terms)
    return Signals(
        dense=_best_similarity(question, hits, embedder),
        sentence=float(evidence.support.cover.max(initial=0.0)),
        chunk=max(coverage(asked, stems, evidence.weights) for stems in by_hit),
    )


def _best_similarity(question: str, hits: Sequence[RankedChunk], embedder: Embedder) -> float:
    known = [hit.dense for hit in hits if hit.dense is not None]
    if known:
        return max(known)
    vectors = embedder.encode([hit.chunk.text for hit in hits[:_COMPARED_CHUNKS]])
    return float((vectors @ embedder.encode_queries([question])[0]).max())
