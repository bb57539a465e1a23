"""LlamaIndex nodes as documents of a store, and back.

A node becomes a document of one chunk: what its vector was made of, which is the text with the metadata that are
embedded. So equal documents have equal vectors, as a store wants it. Where the node's own text stands in it, and the
rest of the node, lie in the metadata of the document's link; nodes of one LlamaIndex document are links of one source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from ragkit.errors import UsageError
from ragkit.readers.encodings import clean
from ragkit.readers.table_rows import to_scalar
from ragkit.retrieval.base import FloatMatrix
from ragkit.store.base import DocumentLink, IndexedDocument
from ragkit.types import Chunk, Document, MetadataValue, chunk_id_of

PREFIX = "llama-index:"
RECIPE = "llama-index"
NODE_ID = "_node_id"
_CONTENT, _TYPE, _START, _TEXT = "_node_content", "_node_type", "_node_text_start", "_node_text"


def source_of(node: BaseNode) -> str:
    """Return the URI of the source that a node belongs to: its LlamaIndex document, or itself where it has none."""
    return source_uri(node.ref_doc_id or node.node_id)


def source_uri(ref_doc_id: str) -> str:
    """Return the URI under which a LlamaIndex document is stored."""
    return PREFIX + ref_doc_id


def document_of(node: BaseNode) -> Document:
    """Return the document that a node is stored as.

    Raises:
        UsageError: the node has no text.
    """
    embedded = clean(node.get_content(metadata_mode=MetadataMode.EMBED))[0]
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    if not embedded.strip():
        raise UsageError(f"node {node.node_id} has no text, and a store keeps nothing else: leave it out")
    facts: dict[str, MetadataValue] = {}  # for the store's own filters; lists and the like lie in the node's content
    for key, value in node.metadata.items():
        if not isinstance(value, dict | list | tuple | set | bytes):
            scalar = to_scalar(value)
            facts[clean(str(key))[0]] = clean(scalar)[0] if isinstance(scalar, str) else scalar
    written = node_to_metadata_dict(node, remove_text=embedded.endswith(text))
    facts |= {NODE_ID: node.node_id, _TYPE: written["_node_type"], _CONTENT: written["_node_content"]}
    if embedded.endswith(text):
        facts[_START] = len(embedded) - len(text)
    else:  # a template of the user's puts something behind it, or the text was not valid
        facts[_TEXT] = text.encode("utf-8", "replace").decode("utf-8")
    return Document.from_text(embedded, f"{source_of(node)}#node={node.node_id}", metadata=facts)


def indexed(document: Document, vector: FloatMatrix, tokens: int) -> IndexedDocument:
    """Return a document as one chunk with its vector (1, dim)."""
    stop = len(document.text)
    chunk = Chunk(chunk_id_of(document.doc_id, 0, stop), document.doc_id, 0, document.text, 0, stop, tokens)
    return IndexedDocument(document, [chunk], vector)


def node_of(link: DocumentLink, text: str) -> BaseNode | None:
    """Return the node of a link to a document of `text`, or None where the link is not a node's."""
    if NODE_ID not in link.metadata:
        return None
    facts: Mapping[str, Any] = link.metadata
    start = facts.get(_START)
    own = str(facts[_TEXT]) if start is None else text[int(start) :]
    return metadata_dict_to_node({_CONTENT: facts[_CONTENT], _TYPE: facts[_TYPE]}, text=own)


def unit_vector(node: BaseNode) -> FloatMatrix:
    """Return the embedding of a node as a row (1, dim) of length one.

    Raises:
        UsageError: it has none, or one without a direction.
    """
    if node.embedding is None:
        raise UsageError(f"node {node.node_id} has no embedding: embed nodes before they are added")
    return unit(node.embedding, f"the embedding of node {node.node_id}")


def unit(values: Sequence[float], what: str) -> FloatMatrix:
    """Return a vector as a row (1, dim) of length one; `what` names it in errors."""
    row = np.asarray([values], dtype=np.float64)
    length = float(np.linalg.norm(row))
    if not np.isfinite(length) or length == 0:
        raise UsageError(f"{what} has no direction: it is all zero, or not finite")
    return (row / length).astype(np.float32)


def digest_facts(documents: Sequence[tuple[str, str]]) -> str:
    """Return the text whose digest says what a source holds: (node id, document id) of each node."""
    return json.dumps(sorted(documents))
