"""The sentences of the retrieved chunks, and how well each supports an answer.

Most of the support is lexical and costs next to nothing: which share of the question's content words a sentence
holds, each weighted by its rarity among these sentences, with its neighbours' and its chunk's. Only the best few
sentences are embedded, in one batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ragkit.answers.base import RankedChunk
from ragkit.answers.terms import Term, terms
from ragkit.chunking.sentences import sentence_spans
from ragkit.retrieval.base import Embedder

EMBEDDED_SENTENCES = 8
SUPPORT_COLUMNS = ("cover", "before", "after", "chunk_best", "chunk_dense", "chunk_score", "answer")


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of a retrieved chunk, without the white space around it.

    Attributes:
        hit: index of its chunk in the ranked list.
        text: its text.
        char_start, char_stop: half-open span in its document.
        terms: its content words; their offsets count from `char_start`.
    """

    hit: int
    text: str
    char_start: int
    char_stop: int
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Support:
    """What speaks for each sentence, one row each; every column but `dense` is known without embedding.

    Attributes:
        cover: share of the question's weight that the sentence's words hold.
        before, after: `cover` of its neighbours in the chunk, for sentences that go on about the same.
        chunk_best: best `cover` within its chunk.
        chunk_dense: cosine similarity of question and chunk; the lowest known one where the chunk has none.
        chunk_score: the chunk's fused score as a share of the best one's.
        answer: share of the answer's weight, words of the question left out; 0 without an answer.
    """

    cover: NDArray[np.float64]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    chunk_best: NDArray[np.float64]
    chunk_dense: NDArray[np.float64]
    chunk_score: NDArray[np.float64]
    answer: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The sentences of the hits in reading order, chunk by chunk, and what speaks for them.

    Attributes:
        sentences: the candidates; a span that two overlapping chunks hold comes once.
        support: one row a sentence.
        weights: weight of each content word of question and answer: its rarity among the sentences.
    """

    sentences: tuple[Sentence, ...]
    support: Support
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SupportWeights:
    """A linear model of support; `benchmarks/answer_quality.py --fit` prints it."""

    dense: float
    cover: float
    before: float
    after: float
    chunk_best: float
    chunk_dense: float
    chunk_score: float
    answer: float


WEIGHTS = SupportWeights(
    dense=4.16, cover=6.5, before=1.62, after=1.12, chunk_best=3.59, chunk_dense=9.68, chunk_score=3.11, answer=2.0
)


def gather_evidence(question: str, answer: str | None, hits: Sequence[RankedChunk]) -> Evidence:
    """Return the sentences of `hits` with their lexical support for the question and the generated answer."""
    sentences = _sentences(hits)
    asked = list(dict.fromkeys(term.stem for term in terms(question)))
    answered = [stem for stem in dict.fromkeys(term.stem for term in terms(answer or "")) if stem not in asked]
    weights = _rarity([*asked, *answered], sentences)
    held = [frozenset(term.stem for term in sentence.terms) for sentence in sentences]
    cover = np.array([coverage(asked, stems, weights) for stems in held])
    owners = np.array([sentence.hit for sentence in sentences], dtype=np.int64)
    known = [hit.dense for hit in hits if hit.dense is not None]
    dense = np.array([min(known, default=0.0) if hit.dense is None else hit.dense for hit in hits])
    top = max((hit.score for hit in hits), default=0.0)
    scores = np.array([hit.score / top if top > 0 else 1.0 for hit in hits])
    best = np.zeros(len(hits))
    np.maximum.at(best, owners, cover)
    before, after = np.zeros_like(cover), np.zeros_like(cover)
    same = owners[1:] == owners[:-1]
    before[1:], after[:-1] = cover[:-1] * same, cover[1:] * same
    support = Support(
        cover=cover,
        before=before,
        after=after,
        chunk_best=best[owners],
        chunk_dense=dense[owners],
        chunk_score=scores[owners],
        answer=np.array([coverage(answered, stems, weights) for stems in held]),
    )
    return Evidence(sentences, support, weights)


def lexical_scores(support: Support, weights: SupportWeights = WEIGHTS) -> NDArray[np.float64]:
    """Return (sentences,) scores from everything that is known without embedding."""
    columns = (getattr(weights, name) * getattr(support, name) for name in SUPPORT_COLUMNS)
    return sum(columns, start=np.zeros(len(support.cover)))


def support_probabilities(
    question: str, evidence: Evidence, embedder: Embedder, embedded: int = EMBEDDED_SENTENCES
) -> NDArray[np.float64]:
    """Return (sentences,) probabilities that sum to 1: how likely each sentence is the one with the answer.

    The `embedded` lexically best sentences are compared with the question as vectors; the others get 0.
    """
    scores = lexical_scores(evidence.support)
    if not len(scores):
        return scores
    chosen = np.argsort(-scores, kind="stable")[:embedded]
    vectors = embedder.encode([evidence.sentences[index].text for index in chosen])
    similarity = vectors @ embedder.encode_queries([question])[0]
    final = scores[chosen] + WEIGHTS.dense * similarity.astype(np.float64)
    shares = np.exp(final - final.max())
    probabilities = np.zeros(len(scores))
    probabilities[chosen] = shares / shares.sum()
    return probabilities


def coverage(wanted: Sequence[str], held: Iterable[str], weights: Mapping[str, float]) -> float:
    """Return the share, by weight, of the words `wanted` that are in `held`; 0 where nothing is wanted."""
    total = sum(weights[stem] for stem in wanted)
    return sum(weights[stem] for stem in wanted if stem in held) / total if total else 0.0


def _sentences(hits: Sequence[RankedChunk]) -> tuple[Sentence, ...]:
    found: list[Sentence] = []
    seen: set[tuple[str, int, int]] = set()
    for index, hit in enumerate(hits):
        for start, stop in sentence_spans(hit.chunk.text):
            raw = hit.chunk.text[start:stop]
            text = raw.strip()
            char_start = hit.chunk.char_start + start + len(raw) - len(raw.lstrip())
            span = (hit.chunk.doc_id, char_start, char_start + len(text))
            if span in seen or not _says_something(text):
                continue
            seen.add(span)
            found.append(Sentence(index, text, span[1], span[2], tuple(terms(text))))
    return tuple(found)


def _says_something(text: str) -> bool:
    """Whether a sentence can support anything: a heading or a rule of a table cannot."""
    return not text.startswith("#") and any(char.isalnum() for char in text)


def _rarity(stems: Sequence[str], sentences: Sequence[Sentence]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update({term.stem for term in sentence.terms})
    total = len(sentences)
    return {stem: math.log(1 + (total - counts[stem] + 0.5) / (counts[stem] + 0.5)) for stem in stems}
