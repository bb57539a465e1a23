"""ragkit's search as a LlamaIndex retriever: dense vectors and BM25, fused, over one store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from llama_index.core.callbacks import CallbackManager
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle

from ragkit.config import SearchMode
from ragkit.integrations.llama_index_nodes import hit_node
from ragkit.pipeline import Pipeline
from ragkit.types import MetadataValue


class RagkitRetriever(BaseRetriever):  # type: ignore[misc]
    """Retrieves chunks of a pipeline's store. Nodes have the chunks' ids, exact spans, URIs and pages.

    The question is embedded by the pipeline; an embedding that a `QueryBundle` brings is not used, since it may be
    another model's.

    Args:
        pipeline: where to search.
        k: how many chunks; the configuration's number where left out.
        filter: metadata that a chunk's document must have; `uri` takes a glob.
        mode: hybrid, dense or bm25; the configuration's where left out.
        callback_manager: LlamaIndex's.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        k: int | None = None,
        filter: Mapping[str, MetadataValue] | None = None,
        mode: SearchMode | str | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._k = k
        self._filter = filter
        self._mode = mode
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._pipeline.search(query_bundle.query_str, k=self._k, filter=self._filter, mode=self._mode)
        return [hit_node(hit) for hit in found.hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)
