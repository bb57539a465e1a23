"""Sources to documents: sniffing, parsing in a killable child, page spans.

`discover` names the files, `ReaderPool.map` or `read_source` reads them. Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragkit.readers.base import FailedRow, Reader, ReadLimits
    from ragkit.readers.llama_index import read_llama_index, read_llama_index_store
    from ragkit.readers.media_type import MediaType, sniff
    from ragkit.readers.origin import Skipped, Source
    from ragkit.readers.pool import ReaderPool
    from ragkit.readers.reading import read_documents, read_source
    from ragkit.readers.result import ReadFailure, ReadResult
    from ragkit.readers.source import content_sha256, discover
    from ragkit.readers.sql import sql_source

_HOME = {
    "FailedRow": "base",
    "MediaType": "media_type",
    "ReadFailure": "result",
    "ReadLimits": "base",
    "ReadResult": "result",
    "Reader": "base",
    "ReaderPool": "pool",
    "Skipped": "origin",
    "Source": "origin",
    "content_sha256": "source",
    "discover": "source",
    "read_documents": "reading",
    "read_llama_index": "llama_index",
    "read_llama_index_store": "llama_index",
    "read_source": "reading",
    "sniff": "media_type",
    "sql_source": "sql",
}

__all__ = [
    "FailedRow",
    "MediaType",
    "ReadFailure",
    "ReadLimits",
    "ReadResult",
    "Reader",
    "ReaderPool",
    "Skipped",
    "Source",
    "content_sha256",
    "discover",
    "read_documents",
    "read_llama_index",
    "read_llama_index_store",
    "read_source",
    "sniff",
    "sql_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ragkit.readers' has no attribute {name!r}")
    return getattr(import_module(f"ragkit.readers.{_HOME[name]}"), name)
