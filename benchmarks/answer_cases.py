"""Questions with what the product retrieves for them: where the answer is there, and where it was taken away.

Documents, chunks and questions come from `retrieval_data`; chunks are retrieved by `Retriever` with its defaults, from
a store of the whole collection. A document is taken away by removing it from the store while its questions are asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval_data import Question, QuestionSet

from ragkit.answers.base import RankedChunk
from ragkit.config import RetrievalConfig
from ragkit.retrieval.retriever import Retriever
from ragkit.store.base import IndexedDocument, SourceUpdate
from ragkit.store.store import Store


@dataclass(frozen=True)
class Case:
    """One question, its gold spans (none where it has no answer there), and its hits."""

    question: Question
    hits: tuple[RankedChunk, ...]


class Collection:
    """A question set in a store of its own, with a retriever on top."""

    def __init__(self, data: QuestionSet, embedder: Any, folder: Path) -> None:
        self.data = data
        self._embedder = embedder
        self._updates: dict[str, SourceUpdate] = {}
        for uri, document in data.documents.items():
            chunks = data.chunks[uri]
            vectors = embedder.encode([chunk.text for chunk in chunks])
            indexed = IndexedDocument(document, chunks, vectors)
            self._updates[uri] = SourceUpdate(uri, document.doc_id, len(document.text), 0, documents=(indexed,))
        self._store = Store.create(folder)
        with self._store.writer() as writer:
            writer.configure(
                embedder_id=embedder.embedder_id, dim=embedder.dim, chunker="benchmark", chunker_fingerprint="",
                tokenizer_id="",
            )  # fmt: skip
            writer.commit(list(self._updates.values()))
        self._retriever = Retriever(self._store, embedder, RetrievalConfig())

    def ask(self, question: Question, uri: str | None = None) -> Case:
        """Return the case of `question` over the collection, or over the document `uri` alone."""
        found = self._retriever.retrieve(question.text, filter={"uri": uri} if uri else None).chunks
        hits = (
            RankedChunk(one.stored.chunk, one.stored.uri, one.score, one.dense, one.bm25, one.rank) for one in found
        )
        return Case(question, tuple(hits))

    def without_own_document(self) -> Iterator[Case]:
        """Yield each question, in order, asked of the collection from which its document was removed."""
        by_document: dict[str, list[int]] = {}
        for index, question in enumerate(self.data.questions):
            by_document.setdefault(question.gold[0][0], []).append(index)
        cases: dict[int, Case] = {}
        for uri, indices in by_document.items():
            with self._store.writer() as writer:
                writer.remove([uri])
            for index in indices:
                cases[index] = self.ask(self.data.questions[index])
            with self._store.writer() as writer:
                writer.commit([self._updates[uri]])
        for index in range(len(self.data.questions)):
            yield Case(Question(cases[index].question.text, ()), cases[index].hits)

    def other_documents(self, seed: int = 0) -> Iterator[Case]:
        """Yield each question, in order, asked of one other document alone."""
        chooser = random.Random(seed)
        for question in self.data.questions:
            other = chooser.choice([uri for uri in self.data.documents if uri != question.gold[0][0]])
            yield Case(Question(question.text, ()), self.ask(question, other).hits)


def without_passage(case: Case) -> Case:
    """Return the case with the chunks that hold the gold span taken out of its hits: the hardest refusals."""
    ((uri, start, stop),) = case.question.gold
    hits = (h for h in case.hits if h.uri != uri or h.chunk.char_stop <= start or stop <= h.chunk.char_start)
    return Case(Question(case.question.text, ()), tuple(hits))


def all_cases(collections: Mapping[str, Collection]) -> dict[str, list[Case]]:
    """Return the cases by kind; item i of every kind of xquad is its i-th question."""
    xquad, other = collections["xquad"], collections["chunking_evaluation"]
    foreign = [Question(question.text, ()) for question in other.data.questions]
    answerable = [xquad.ask(question) for question in xquad.data.questions]
    return {
        "answerable": answerable,
        "document removed": list(xquad.without_own_document()),
        "only its passage removed": [without_passage(case) for case in answerable],
        "one other document": list(xquad.other_documents()),
        "own document": [xquad.ask(question, question.gold[0][0]) for question in xquad.data.questions],
        "other collection, answerable": [other.ask(question) for question in other.data.questions],
        "other collection, asked of xquad": [xquad.ask(question) for question in foreign],
        "xquad, asked of the other collection": [
            other.ask(Question(question.text, ())) for question in xquad.data.questions
        ],
    }
