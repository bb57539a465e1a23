"""LlamaIndex nodes written to a store: added, replaced and deleted in transactions of whole sources."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np
from llama_index.core.schema import BaseNode

from ragkit.errors import UsageError
from ragkit.integrations.llama_index_records import (
    NODE_ID,
    RECIPE,
    digest_facts,
    document_of,
    indexed,
    source_of,
    source_uri,
    unit_vector,
)
from ragkit.pipeline import Pipeline
from ragkit.retrieval.base import FloatMatrix
from ragkit.retrieval.flat import FlatIndex, positions_of
from ragkit.store import Store
from ragkit.store.base import DocumentLink, IndexedDocument, KnownDocument, SourceUpdate, StoreWriter
from ragkit.types import Document

_SAME = 1 - 1e-3  # cosine of vectors that one model gives for one text, in any batch and precision


class NodeWriter:
    """Writes nodes to one pipeline's store."""

    def __init__(self, pipeline: Pipeline, embedder_id: str) -> None:
        self._pipeline = pipeline
        self._embedder_id = embedder_id

    def add(self, nodes: Sequence[BaseNode]) -> list[str]:
        """Store nodes with their embeddings, in one transaction, and return their ids."""
        if not nodes:
            return []
        latest = {node.node_id: (node, document_of(node), unit_vector(node)) for node in nodes}
        dims = {vector.shape[1] for _, _, vector in latest.values()}
        if len(dims) > 1:
            raise UsageError(f"embeddings of one store have one length, got {sorted(dims)}")
        parts = self._pipeline.parts
        store, tokenizer = parts.create_store(), parts.tokenizer
        counts = tokenizer.count_batch([document.text for _, document, _ in latest.values()])
        with self._writer(store) as writer:
            meta = store.meta
            writer.configure(
                embedder_id=self._embedder_id,
                dim=dims.pop(),
                chunker=meta.chunker or RECIPE,
                chunker_fingerprint=meta.chunker_fingerprint or RECIPE,
                tokenizer_id=meta.tokenizer_id or tokenizer.tokenizer_id,
            )
            known = _KnownVectors(store)
            added: dict[str, list[IndexedDocument | KnownDocument]] = {}
            for (node, document, vector), tokens in zip(latest.values(), counts, strict=True):
                is_known = known.agrees(document, vector, node.node_id)
                added.setdefault(source_of(node), []).append(
                    KnownDocument(document.doc_id, document.uri, document.metadata)
                    if is_known
                    else indexed(document, vector, tokens)
                )
            writer.commit(
                [_update(uri, [*_others(store, uri, latest), *documents]) for uri, documents in added.items()]
            )
            self._leave_other_sources(store, writer, latest)
        self._pipeline.parts.forget_removed()
        return [node.node_id for node in nodes]

    def delete_document(self, ref_doc_id: str) -> None:
        """Forget the source of a LlamaIndex document, or ragkit's own source of that URI."""
        if not self._pipeline.parts.has_store():
            return
        store = self._pipeline.store
        for uri in (source_uri(ref_doc_id), ref_doc_id):
            if store.source(uri) is not None:
                self._pipeline.remove([uri])
                return

    def delete_nodes(self, nodes: Sequence[BaseNode]) -> None:
        """Forget single nodes.

        Raises:
            UsageError: one of them is a chunk of a document that ragkit ingested, which only goes with its document.
        """
        gone = {node.node_id for node in nodes}
        store = self._pipeline.store
        with self._writer(store) as writer:
            for uri in sorted({source_of(node) for node in nodes}):
                if store.source(uri) is None:
                    raise UsageError(
                        f"a chunk of {uri.partition(':')[2]} goes with its document alone: delete that instead"
                    )
                _keep(store, writer, uri, _others(store, uri, gone))
        self._pipeline.parts.forget_removed()

    def clear(self) -> None:
        """Forget every source of the store."""
        if self._pipeline.parts.has_store():
            self._pipeline.remove([record.uri for record in self._pipeline.documents()])

    def _writer(self, store: Store) -> AbstractContextManager[StoreWriter]:
        return store.writer(lock_timeout_s=self._pipeline.config.ingest.lock_timeout_s)

    def _leave_other_sources(
        self, store: Store, writer: StoreWriter, nodes: dict[str, tuple[BaseNode, Document, FloatMatrix]]
    ) -> None:
        """Take nodes that were added out of the sources that they belonged to before."""
        for node_id, (node, _, _) in nodes.items():
            for uri in _sources_with(store, node_id) - {source_of(node)}:
                _keep(store, writer, uri, _others(store, uri, {node_id}))


class _KnownVectors:
    """The vectors of texts that a store holds already."""

    def __init__(self, store: Store) -> None:
        self._store = store
        table = store.vectors()
        self._row_ids = table.row_ids
        self._index = FlatIndex(table.row_ids, [part.vectors for part in table.parts])

    def agrees(self, document: Document, vector: FloatMatrix, node_id: str) -> bool:
        """Return whether a document is stored, with this vector.

        Raises:
            UsageError: it is stored with another vector, or cut into several chunks.
        """
        if self._store.document_recipe(document.doc_id) is None:
            return False
        rows = self._store.rows_where({"doc_id": document.doc_id})
        if len(rows) != 1:
            raise UsageError(
                f"the store holds the text of node {node_id} already, cut into {len(rows)} chunks: keep nodes of "
                "LlamaIndex and files of ragkit in stores of their own"
            )
        stored = self._index.take(positions_of(self._row_ids, rows))
        if float(np.vdot(stored, vector)) < _SAME:
            raise UsageError(
                f"the store holds the text of node {node_id} with another vector: it was embedded by another model. "
                "Delete it first, or give each embedding model a store, or an embedder_id, of its own"
            )
        return True


def _others(store: Store, uri: str, gone: Iterable[str]) -> list[KnownDocument]:
    """Return the stored nodes of a source without some."""
    left_out = set(gone)
    return [
        KnownDocument(link.doc_id, link.uri, link.metadata)
        for link in store.source_documents(uri)
        if str(link.metadata.get(NODE_ID)) not in left_out
    ]


def _sources_with(store: Store, node_id: str) -> set[str]:
    links: list[DocumentLink] = []
    rows = store.rows_where({NODE_ID: node_id})
    for stored in store.chunks(rows):
        links += store.links(stored.chunk.doc_id)
    return {link.source_uri for link in links if link.metadata.get(NODE_ID) == node_id}


def _keep(store: Store, writer: StoreWriter, uri: str, documents: list[KnownDocument]) -> None:
    if documents:
        writer.commit([_update(uri, documents)])
    else:
        writer.remove([uri])


def _update(uri: str, documents: Sequence[IndexedDocument | KnownDocument]) -> SourceUpdate:
    facts, size = [], 0
    for one in documents:
        doc = one.document if isinstance(one, IndexedDocument) else one
        facts.append((str(doc.metadata[NODE_ID]), doc.doc_id))
        size += len(one.document.text) if isinstance(one, IndexedDocument) else 0
    digest = hashlib.sha256(digest_facts(facts).encode()).hexdigest()
    return SourceUpdate(uri, digest, size, 0, reader=RECIPE, recipe=RECIPE, documents=tuple(documents))
