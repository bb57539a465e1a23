"""Commit groups: what a caller hands in is checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ragkit.errors import UsageError
from ragkit.store.records import IndexedDocument, SourceUpdate
from ragkit.store.rows import metadata_to_json
from ragkit.types import chunk_id_of, document_id

if TYPE_CHECKING:
    from ragkit.store.records import RowIds, Vectors


def check_group(group: Sequence[SourceUpdate], dim: int) -> None:
    """Raise `UsageError` naming the first contradiction of a commit group; `dim` is the store's."""
    seen: set[str] = set()
    for update in group:
        if update.uri in seen:
            raise UsageError(f"{update.uri} stands twice in one commit group: give each source once")
        seen.add(update.uri)
        if update.failure is not None and update.documents:
            raise UsageError(f"{update.uri} has both documents and a failure: give one of them")
        if update.failure is not None and update.more:
            raise UsageError(f"{update.uri} failed, and more of it is to follow: give one of them")
        if update.failure is not None and not update.failure.code:
            raise UsageError(f"{update.uri} failed without a code: give a stable reason such as 'corrupt'")
        for item in update.documents:
            if isinstance(item, IndexedDocument):
                _check_document(item, dim)
            else:
                metadata_to_json(item.uri, item.metadata)


def group_bytes(group: Sequence[SourceUpdate]) -> int:
    """Return about how many bytes committing a group takes: vectors, text, its log copy and full-text rows."""
    total = 0
    for update in group:
        for item in update.documents:
            if isinstance(item, IndexedDocument):
                total += item.vectors.nbytes + 4 * len(item.document.text) + 200 * len(item.chunks)
    return total + 4096 * len(group)


def _check_document(item: IndexedDocument, dim: int) -> None:
    document, chunks = item.document, item.chunks
    if document.doc_id != document_id(document.text, document.pages):
        raise UsageError(f"{document.uri}: its id {document.doc_id} is not that of its text: use Document.from_text")
    metadata_to_json(document.uri, document.metadata)
    _check_vectors(item, dim)
    covered = 0
    for index, chunk in enumerate(chunks):
        span = (chunk.char_start, chunk.char_stop)
        if chunk.index != index or chunk.doc_id != document.doc_id or not span[0] <= covered < span[1]:
            raise UsageError(f"{document.uri}: chunk {index} with span {span} does not go on at {covered}")
        if chunk.text != document.text[span[0] : span[1]]:
            raise UsageError(f"{document.uri}: chunk {index} does not hold the text of its span {span}")
        if chunk.chunk_id != chunk_id_of(document.doc_id, *span):
            raise UsageError(f"{document.uri}: chunk {index} has id {chunk.chunk_id}, not that of its span {span}")
        covered = span[1]
    if covered != len(document.text):
        raise UsageError(f"{document.uri}: the chunks end at {covered}, the text at {len(document.text)}")


def _check_vectors(item: IndexedDocument, dim: int) -> None:
    import numpy as np

    vectors, uri = item.vectors, item.document.uri
    if dim == 0 and len(item.chunks):
        raise UsageError(f"{uri}: the store does not know its embedder yet: call configure before commit")
    if vectors.dtype != np.float32 or vectors.shape != (len(item.chunks), dim):
        raise UsageError(
            f"{uri}: vectors must be float32 of shape ({len(item.chunks)}, {dim}), got {vectors.dtype} {vectors.shape}"
        )
    if not np.isfinite(vectors).all():
        raise UsageError(f"{uri}: a vector holds a value that is not finite")


def check_row_ids(row_ids: RowIds, vectors: Vectors | None = None) -> None:
    """Raise `UsageError` unless row ids ascend and, if given, belong one to one to vectors."""
    import numpy as np

    if vectors is not None and len(row_ids) != len(vectors):
        raise UsageError(f"{len(row_ids)} row ids were given for {len(vectors)} vectors")
    if len(row_ids) and not (np.diff(row_ids) > 0).all():
        raise UsageError("row ids must ascend without repetition")
