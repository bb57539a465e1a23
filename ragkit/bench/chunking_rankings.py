"""A collection in chunks, and what each question finds there: by embeddings, by BM25, and by both."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from ragkit.bench.question_sets import QuestionSet
from ragkit.bench.spans import Span, within_budget
from ragkit.chunking.base import Chunker, check_chunks
from ragkit.retrieval.base import ChunkEmbedder, Embedder
from ragkit.retrieval.fusion import Ranked, score_fusion
from ragkit.store.base import DocumentSpans

DEPTH = 200  # chunks of a ranking that are kept
_LEG_DEPTH = 100  # hits that each leg contributes to the fusion, as the product's default is
_WORD = re.compile(r"[a-z0-9]+")

Rows = NDArray[np.int32]


class Mode(StrEnum):
    """What a ranking is made by; `hybrid` weighs both legs' scores alike, as the product's default does."""

    DENSE = "dense"
    BM25 = "bm25"
    HYBRID = "hybrid"


@dataclass(frozen=True, slots=True)
class Ranking:
    """One collection in chunks, with the ranking of each question by mode: (questions, at most `DEPTH`) chunk numbers.

    A ranking that is shorter ends with -1.
    """

    spans: Sequence[Span]
    rows: dict[Mode, Rows]

    def retrieved(self, mode: Mode, question: int, characters: int) -> list[Span]:
        """Return what a question gets within a budget."""
        return within_budget(self._ranked(mode, question), characters)

    @property
    def mean_characters(self) -> float:
        """Mean length of a chunk."""
        return float(np.mean([stop - start for _, start, stop in self.spans]))

    def _ranked(self, mode: Mode, question: int) -> Iterator[Span]:
        return (self.spans[row] for row in self.rows[mode][question].tolist() if row >= 0)


def rank(
    data: QuestionSet, chunker: Chunker, max_tokens: int, chunk_embedder: ChunkEmbedder, embedder: Embedder
) -> Ranking:
    """Return the collection in chunks and every question's rankings.

    Args:
        data: documents and questions.
        chunker: cuts the documents; its chunks are held to the contract.
        max_tokens: the cap.
        chunk_embedder: embeds the chunks.
        embedder: embeds the questions.
    """
    spans: list[Span] = []
    texts: list[str] = []
    documents: list[DocumentSpans] = []
    for uri, document in data.documents.items():
        chunks = chunker.chunk(document)
        check_chunks(document, chunks, max_tokens)
        places = [(chunk.char_start, chunk.char_stop) for chunk in chunks]
        documents.append(DocumentSpans(document.text, places))
        spans += [(uri, start, stop) for start, stop in places]
        texts += [chunk.text for chunk in chunks]
    questions = [question.text for question in data.questions]
    similarity = embedder.encode_queries(questions) @ chunk_embedder.encode_chunks(documents).T
    lexical = bm25_scores(texts, questions)
    return Ranking(
        spans,
        {
            Mode.DENSE: _best(similarity),
            Mode.BM25: _best(lexical),
            Mode.HYBRID: np.stack([_fused(one, two) for one, two in zip(similarity, lexical, strict=True)]),
        },
    )


def bm25_scores(
    texts: Sequence[str], questions: Sequence[str], k1: float = 1.5, b: float = 0.75
) -> NDArray[np.float64]:
    """Return (questions, texts) BM25 scores over words of ASCII letters and digits, unstemmed.

    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009), with the inverse
    document frequency log(1 + (N - n + 0.5) / (n + 0.5)).
    """
    words = [Counter(_WORD.findall(text.lower())) for text in texts]
    lengths = np.array([sum(counts.values()) for counts in words], dtype=np.float64)
    penalty = k1 * (1 - b + b * lengths / max(1.0, float(lengths.mean()))) if len(lengths) else lengths
    postings: dict[str, list[tuple[int, int]]] = {}
    for row, counts in enumerate(words):
        for word, count in counts.items():
            postings.setdefault(word, []).append((row, count))
    scores = np.zeros((len(questions), len(texts)))
    for at, question in enumerate(questions):
        for word in set(_WORD.findall(question.lower())):
            found = postings.get(word)
            if found:
                rows, counts_of = (np.array(part) for part in zip(*found, strict=True))
                idf = np.log(1 + (len(texts) - len(found) + 0.5) / (len(found) + 0.5))
                scores[at, rows] += idf * counts_of * (k1 + 1) / (counts_of + penalty[rows])
    return scores


def _best(scores: NDArray[np.floating]) -> Rows:
    return np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH].astype(np.int32)


def _fused(dense: NDArray[np.floating], lexical: NDArray[np.floating]) -> Rows:
    """Return the rows by the sum of both legs' scores, each over its leg's best one."""
    lists = []
    for scores in (dense, lexical):
        rows = np.argsort(-scores, kind="stable")[:_LEG_DEPTH].astype(np.int64)
        lists.append(Ranked(rows, scores[rows].astype(np.float32), 0.5))
    fused = [row for row, _ in score_fusion(lists)][:DEPTH]
    return np.array(fused + [-1] * (DEPTH - len(fused)), dtype=np.int32)
