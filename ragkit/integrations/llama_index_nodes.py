"""Chunks and citations as LlamaIndex nodes, with the exact spans of both."""

from __future__ import annotations

from llama_index.core.schema import NodeRelationship, NodeWithScore, ObjectType, RelatedNodeInfo, TextNode

from ragkit.reports import Hit
from ragkit.types import Chunk, Citation, Metadata, chunk_id_of

#: Metadata that a node has of its chunk and that are neither embedded nor shown to a language model.
CHUNK_ID_KEY, TOKEN_COUNT_KEY = "ragkit_chunk_id", "ragkit_token_count"
URI_KEY, PAGE_KEY = "uri", "page"
HIDDEN_KEYS = (CHUNK_ID_KEY, TOKEN_COUNT_KEY)


def chunk_node(chunk: Chunk, uri: str, metadata: Metadata) -> TextNode:
    """Return a stored chunk as a node: its id is the chunk's, its source the document's URI."""
    return _node(
        chunk.chunk_id,
        chunk.text,
        (chunk.char_start, chunk.char_stop),
        uri,
        {
            **metadata,
            **chunk.metadata,
            **_place(uri, chunk.page),
            CHUNK_ID_KEY: chunk.chunk_id,
            TOKEN_COUNT_KEY: chunk.token_count,
        },
    )


def hit_node(hit: Hit) -> NodeWithScore:
    """Return a hit of a search as a node with its score."""
    metadata = {**hit.metadata, **_place(hit.uri, hit.page), CHUNK_ID_KEY: hit.chunk_id}
    node = _node(hit.chunk_id, hit.text, (hit.char_start, hit.char_stop), hit.uri, metadata)
    return NodeWithScore(node=node, score=hit.score)


def citation_node(citation: Citation) -> NodeWithScore:
    """Return a citation as a node with its score; its id names the cited span."""
    span = (citation.char_start, citation.char_stop)
    metadata = {**_place(citation.uri, citation.page), "ragkit_doc_id": citation.doc_id}
    node = _node(chunk_id_of(citation.doc_id, *span), citation.quote, span, citation.uri, metadata)
    return NodeWithScore(node=node, score=citation.score)


def _place(uri: str, page: int | None) -> Metadata:
    return {URI_KEY: uri} if page is None else {URI_KEY: uri, PAGE_KEY: page}


def _node(node_id: str, text: str, span: tuple[int, int], uri: str, metadata: Metadata) -> TextNode:
    source = RelatedNodeInfo(node_id=uri, node_type=ObjectType.DOCUMENT)
    hidden = [key for key in (*HIDDEN_KEYS, "ragkit_doc_id") if key in metadata]
    return TextNode(
        id_=node_id,
        text=text,
        start_char_idx=span[0],
        end_char_idx=span[1],
        metadata=dict(metadata),
        excluded_embed_metadata_keys=hidden,
        excluded_llm_metadata_keys=hidden,
        relationships={NodeRelationship.SOURCE: source},
    )
