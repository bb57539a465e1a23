"""The catalogue and its segment files: the only place that writes to a store folder."""

from __future__ import annotations

from ragkit.store.base import (
    CommitReport,
    DocumentLink,
    GcReport,
    IndexedDocument,
    IndexRecord,
    KnownDocument,
    KVEntry,
    Problem,
    SourceFailure,
    SourceRecord,
    SourceStatus,
    SourceUpdate,
    StoreCounts,
    StoredChunk,
    StoreMeta,
    StoreReader,
    StoreWriter,
    VectorPart,
    VectorTable,
    VerifyReport,
)
from ragkit.store.fulltext import fts_phrase
from ragkit.store.store import Store

__all__ = [
    "CommitReport",
    "DocumentLink",
    "GcReport",
    "IndexRecord",
    "IndexedDocument",
    "KVEntry",
    "KnownDocument",
    "Problem",
    "SourceFailure",
    "SourceRecord",
    "SourceStatus",
    "SourceUpdate",
    "Store",
    "StoreCounts",
    "StoreMeta",
    "StoreReader",
    "StoreWriter",
    "StoredChunk",
    "VectorPart",
    "VectorTable",
    "VerifyReport",
    "fts_phrase",
]
