"""Stores and vectors made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ragkit.retrieval.base import Embedder
from ragkit.store.base import IndexedDocument, SourceUpdate
from ragkit.store.store import Store
from ragkit.types import Chunk, Document, chunk_id_of


def fill(
    store: Store, embedder: Embedder, documents: dict[str, Sequence[str]], metadata: dict[str, dict] | None = None
) -> None:
    """Commit documents given as their chunks' texts."""
    updates = []
    for uri, texts in documents.items():
        document = Document.from_text("".join(texts), uri=uri, metadata=(metadata or {}).get(uri, {}))
        chunks, start = [], 0
        for index, text in enumerate(texts):
            stop = start + len(text)
            chunk_id = chunk_id_of(document.doc_id, start, stop)
            chunks.append(Chunk(chunk_id, document.doc_id, index, text, start, stop, len(text.split())))
            start = stop
        indexed = IndexedDocument(document, chunks, embedder.encode(list(texts)))
        updates.append(SourceUpdate(uri, document.doc_id, len(document.text), 1, documents=(indexed,)))
    with store.writer() as writer:
        writer.configure(
            embedder_id=embedder.embedder_id, dim=embedder.dim, chunker="given", chunker_fingerprint="", tokenizer_id=""
        )
        writer.commit(updates)


def unit_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Clustered unit rows."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((32, dim), dtype=np.float32)
    vectors = centres[generator.integers(0, 32, rows)] + 0.5 * generator.standard_normal((rows, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
