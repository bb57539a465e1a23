"""The three question sets of the retrieval benchmarks: documents, chunks, questions with gold spans, and their scores.

Read from the folder that RAGKIT_DATA names. Spans are half-open characters of a document.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from report import data_folder

from ragkit.bench.question_sets import Question, code_search_pieces, load_question_set
from ragkit.bench.spans import Span, covered_share, whole_share, within_budget
from ragkit.chunking.registry import create_chunker
from ragkit.config import ChunkingConfig
from ragkit.models import resolve
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.types import Chunk, Document, chunk_id_of

__all__ = ["Question", "QuestionSet", "Span", "load_question_sets", "whole_share", "within_budget"]

# Name of a set -> how the table calls its metric, how many chunks that looks at, and the score of one question.
_METRICS: Mapping[str, tuple[str, int, Callable[[Sequence[Span], Sequence[Span]], float]]] = {
    "chunking_evaluation": ("recall@5", 5, covered_share),
    "xquad": ("hit@1", 1, whole_share),
    "code_search": ("pass@5", 5, whole_share),
}


@dataclass(frozen=True)
class QuestionSet:
    """A collection with its questions.

    Attributes:
        name, metric: how the table calls them.
        k: how many chunks the published metric looks at.
        score: from the retrieved spans, best first, and the gold spans to a number between 0 and 1.
    """

    name: str
    metric: str
    k: int
    documents: Mapping[str, Document]
    chunks: Mapping[str, Sequence[Chunk]]
    questions: Sequence[Question]
    score: Callable[[Sequence[Span], Sequence[Span]], float]


def load_question_sets(names: Sequence[str], chunker: str = "recursive", max_tokens: int = 256) -> list[QuestionSet]:
    """Return the named sets, chunked as the product chunks by default (code_search comes in chunks already)."""
    tokenizer = ModelTokenizer(resolve("smollm2-135m-instruct"))
    cut = create_chunker(ChunkingConfig(chunker=chunker, max_tokens=max_tokens), tokenizer).chunk
    folders = {name: data_folder(name) for name in names}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        sys.exit(f"skipped: RAGKIT_DATA is not set or holds no {', '.join(missing)}")
    sets = []
    for name, folder in folders.items():
        assert folder is not None
        data = load_question_set(name, folder.parent)
        if name == "code_search":
            pieces = code_search_pieces(folder)
            chunks = {
                uri: _given_chunks(document, [text for _, text in pieces[uri]])
                for uri, document in data.documents.items()
            }
        else:
            chunks = {uri: cut(document) for uri, document in data.documents.items()}
        metric, k, score = _METRICS[name]
        sets.append(QuestionSet(name, metric, k, data.documents, chunks, data.questions, score))
    return sets


def _given_chunks(document: Document, texts: Sequence[str]) -> list[Chunk]:
    """Return chunks of these texts, one behind the other; a token is taken for three characters."""
    chunks: list[Chunk] = []
    start = 0
    for index, text in enumerate(texts):
        stop = start + len(text)
        chunk_id = chunk_id_of(document.doc_id, start, stop)
        chunks.append(Chunk(chunk_id, document.doc_id, index, text, start, stop, len(text) // 3))
        start = stop
    return chunks
