"""A ragkit store as a LlamaIndex vector store: for nodes that LlamaIndex writes, and over what ragkit ingested.

Every change is one transaction of the store; nothing has to be persisted. Nodes have their text, so indexes are opened
with `VectorStoreIndex.from_vector_store`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from ragkit.integrations.llama_index_search import NodeSearch
from ragkit.integrations.llama_index_writing import NodeWriter
from ragkit.pipeline import Pipeline

_EMBEDDER = "llama-index"


class RagkitVectorStore(BasePydanticVectorStore):  # type: ignore[misc]
    """Keeps nodes in a ragkit store and finds them by vector, by words, or by both.

    Query modes are `default` (cosine), `text_search` and `sparse` (BM25), `hybrid` (both, weighed by `alpha`) and
    `mmr`; all filter operators and conditions work. The store keeps one vector for one text with its embedded metadata.

    Args:
        folder: the store folder, made by the first `add`.
        embedder_id: what the vectors come from. Vectors of another embedder are refused; give each embedding model its
            own. `from_pipeline` takes the pipeline's, so that LlamaIndex and ragkit can search the same store.

    Raises:
        EmbedderMismatchError: with `add`, where the store's vectors are another embedder's.
        StoreMissingError: with a query, where there is no store yet.
        UsageError: with whatever the store cannot do; the message says what it can.
    """

    stores_text: bool = True
    is_embedding_query: bool = True
    folder: str = Field(default=".ragkit", description="The store folder.")
    embedder_id: str = Field(default=_EMBEDDER, description="What the vectors come from.")

    _pipeline: Pipeline | None = PrivateAttr(default=None)
    _search: NodeSearch | None = PrivateAttr(default=None)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises the vector store by."""
        return "RagkitVectorStore"

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline) -> RagkitVectorStore:
        """Return the vector store over a pipeline's store, for vectors of its embedder (`RagkitEmbedding`)."""
        made = cls(folder=str(pipeline.folder), embedder_id=pipeline.embedder.embedder_id)
        made._pipeline = pipeline
        return made

    @property
    def client(self) -> Pipeline:
        """The pipeline over the store."""
        if self._pipeline is None:
            self._pipeline = Pipeline.open(Path(self.folder))
        return self._pipeline

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes with their embeddings and return their ids; a node of a known id is replaced."""
        return NodeWriter(self.client, self.embedder_id).add(nodes)

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Forget all nodes of a LlamaIndex document, or a source of ragkit's by its URI; unknown ones are no error."""
        NodeWriter(self.client, self.embedder_id).delete_document(ref_doc_id)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Forget the nodes with these ids that fulfil the filters; of neither, none."""
        if node_ids is None and filters is None:
            return
        found = self._searching().nodes(node_ids, filters)
        NodeWriter(self.client, self.embedder_id).delete_nodes(found)

    def clear(self) -> None:
        """Forget everything in the store."""
        NodeWriter(self.client, self.embedder_id).clear()

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Return the nodes with these ids that fulfil the filters; without either, all of them."""
        return self._searching().nodes(node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Return the nodes that fit best, with their scores; higher is better in every mode."""
        return self._searching().query(query, kwargs)

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Do what `add` does in a thread."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Do what `delete` does in a thread."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Do what `delete_nodes` does in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters)

    async def aclear(self) -> None:
        """Do what `clear` does in a thread."""
        await asyncio.to_thread(self.clear)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Return what `get_nodes` returns, found in a thread."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Return what `query` returns, found in a thread."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    def _searching(self) -> NodeSearch:
        store = self.client.store
        if self._search is None or self._search.store is not store:
            self._search = NodeSearch(store, self.client.config.retrieval)
        return self._search
