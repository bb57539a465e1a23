"""ragkit inside LlamaIndex: node parser, vector store, retriever, language model, embedder and query engine.

Needs the extra `llama-index`. docs/llama_index.md shows each at work.
"""

from __future__ import annotations

from ragkit.errors import MissingExtraError

try:
    from ragkit.integrations.llama_index_embedding import RagkitEmbedding
    from ragkit.integrations.llama_index_llm import RagkitLLM
    from ragkit.integrations.llama_index_node_parser import RagkitNodeParser
    from ragkit.integrations.llama_index_nodes import CHUNK_ID_KEY, TOKEN_COUNT_KEY
    from ragkit.integrations.llama_index_query_engine import RagkitQueryEngine
    from ragkit.integrations.llama_index_retriever import RagkitRetriever
    from ragkit.integrations.llama_index_vector_store import RagkitVectorStore
except ImportError as error:
    if (error.name or "").partition(".")[0] != "llama_index":
        raise
    raise MissingExtraError(
        "the LlamaIndex integration needs the package llama-index-core, which is not installed; "
        "install it with: pip install 'ragkit[llama-index]'",
        name="llama_index",
    ) from error

__all__ = [
    "CHUNK_ID_KEY",
    "TOKEN_COUNT_KEY",
    "RagkitEmbedding",
    "RagkitLLM",
    "RagkitNodeParser",
    "RagkitQueryEngine",
    "RagkitRetriever",
    "RagkitVectorStore",
]
