"""What the answer side exchanges: retrieved chunks with their scores, and the decision whether anything was found."""

from __future__ import annotations

from dataclasses import dataclass

from ragkit.types import Chunk


@dataclass(frozen=True, slots=True)
class RankedChunk:
    """One retrieved chunk with what the retriever knew about it.

    Attributes:
        chunk: the chunk.
        uri: where its document came from.
        score: the fused score that ranked it; higher is better.
        dense: cosine similarity of question and chunk, or None where the dense leg did not return it.
        bm25: BM25 score, higher is better, or None where the BM25 leg did not return it.
        rank: 1-based rank in the fused list.
    """

    chunk: Chunk
    uri: str
    score: float
    dense: float | None
    bm25: float | None
    rank: int


@dataclass(frozen=True, slots=True)
class Confidence:
    """Whether the retrieved chunks hold an answer: `found` is `score >= threshold`, both probabilities."""

    found: bool
    score: float
    threshold: float
