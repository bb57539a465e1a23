"""The steps of an ingest by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from doubles import WordTokenizer

from ragkit.chunking.base import PackingChunker
from ragkit.chunking.registry import create_chunker
from ragkit.config import ChunkingConfig
from ragkit.jobs.steps import ChunkedSource, chunk_source
from ragkit.readers import ReadResult, Source
from ragkit.readers.media_type import MediaType
from ragkit.types import Chunk, Document


class Packing:
    """A chunker that notes which documents it cuts together."""

    name = "packing"
    fingerprint = "packing"

    def __init__(self) -> None:
        self.inner = create_chunker(ChunkingConfig(max_tokens=20), WordTokenizer())
        self.together: list[int] = []

    def chunk(self, document: Document) -> list[Chunk]:
        return self.chunk_many([document])[0]

    def chunk_many(self, documents: Sequence[Document]) -> list[list[Chunk]]:
        self.together.append(len(documents))
        return [self.inner.chunk(document) for document in documents]


def read(texts: Sequence[str]) -> ReadResult:
    documents = tuple(Document.from_text(text, f"t.jsonl#row={row}") for row, text in enumerate(texts))
    return ReadResult(Source("t.jsonl", Path("t.jsonl"), 0, 0), MediaType.JSONL, "jsonl", "0" * 64, documents)


def test_the_rows_of_a_table_are_cut_together_each_text_once_and_stored_ones_not_at_all():
    chunker = Packing()
    assert isinstance(chunker, PackingChunker)
    texts = [f"row {number} says a few words about {number % 290} things" for number in range(300)] + ["row 7"] * 3
    result = read(texts)
    stored = {document.doc_id for document in result.documents[:30]}
    found = chunk_source(result, chunker, 20, stored.__contains__)
    assert isinstance(found, ChunkedSource)
    assert chunker.together == [256, 15]
    assert [document for document, _ in found.documents] == list(result.documents)
    for document, chunks in found.documents:
        assert chunks == (None if document.doc_id in stored else chunker.inner.chunk(document))


def test_a_chunker_that_cuts_one_by_one_gives_the_same():
    result = read(["some words here", "and others there"])
    packing = Packing()
    together, alone = (chunk_source(result, chunker, 20, lambda _: False) for chunker in (packing, packing.inner))
    assert isinstance(together, ChunkedSource)
    assert together == alone
