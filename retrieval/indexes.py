"""Which index serves a store: exact search over the mapped vectors up to a size, FAISS's inverted lists above it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ragkit.config import RetrievalConfig
from ragkit.errors import StoreCorruptError
from ragkit.retrieval.base import SearchableStore, VectorIndex
from ragkit.retrieval.flat import FlatIndex

if TYPE_CHECKING:
    from ragkit.store.base import IndexRecord, StoreWriter, VectorTable

logger = logging.getLogger(__name__)

KIND = "ivf-flat"
# An index is written again when more than this share of its rows changed, trained again when they doubled or halved.
REWRITE_SHARE = 0.1
RETRAIN_FACTOR = 2.0


def open_index(store: SearchableStore, config: RetrievalConfig, device: str = "cpu") -> VectorIndex:
    """Return an index over every live vector of the store's generation.

    Call it within the store's snapshot. Up to `config.flat_limit` chunks the search is exact; above, the recorded
    index is read, brought up to date in memory, and used. Without a usable record the search is exact, and the log
    says so.

    Args:
        store: what is searched.
        config: `flat_limit`.
        device: cpu, cuda or cuda:N.

    Raises:
        MissingExtraError: the index that is to be used needs FAISS, which is not installed.
        StoreCorruptError: stored vectors rotted.
    """
    table = store.vectors()
    exact = _exact(table)
    if len(exact) > config.flat_limit:
        record = store.checked_index()
        if record is not None and record.kind == KIND:
            return _open_ivf(record, table, exact, device)
        logger.warning(
            "%d chunks are searched exactly: the store has no usable vector index; the next ingest makes one",
            len(exact),
        )
    if device == "cpu":
        return exact
    from ragkit.retrieval.faiss_flat import FaissFlatIndex

    return FaissFlatIndex(table.row_ids, [part.vectors for part in table.parts], table.dim, device)


def refresh_index(store: SearchableStore, writer: StoreWriter, config: RetrievalConfig) -> IndexRecord | None:
    """Make, update or keep the store's recorded index, and return what was written (None: nothing had to be).

    Call it after a commit, while the writer is open. Small stores need no index.

    Raises:
        MissingExtraError: the store outgrew exact search and FAISS is not installed.
    """
    with store.snapshot() as generation:
        table = store.vectors()
        rows = len(table.row_ids)
        if rows <= config.flat_limit:
            return None
        record = store.checked_index()
        index, params = _updated(record, table) if record is not None and record.kind == KIND else (None, {})
        if index is None and params:
            return None
        if index is None:
            from ragkit.retrieval.ivf_training import train_ivf

            index, facts = train_ivf(table.row_ids, _exact(table), table.dim)
            params = facts.as_params()
    from ragkit.retrieval.faiss_runtime import import_faiss

    faiss = import_faiss()
    return writer.set_index(
        generation=generation,
        row_ids=table.row_ids,
        kind=KIND,
        params=params,
        write=lambda path: faiss.write_index(index, str(path)),
    )


def _updated(record: IndexRecord, table: VectorTable) -> tuple[Any, dict[str, Any]]:
    """Return (index, params) to write, (None, params) where the record still serves, (None, {}) to train anew."""
    from ragkit.retrieval.ivf_index import bring_up_to_date

    rows, trained = len(table.row_ids), int(record.params.get("trained_rows") or 0)
    if not trained or not 1 / RETRAIN_FACTOR <= rows / trained <= RETRAIN_FACTOR:
        return None, {}
    try:
        index = _read(record, table.dim)
    except StoreCorruptError as error:
        logger.warning("%s", error)
        return None, {}
    changed = bring_up_to_date(index, table.row_ids, _exact(table))
    params = dict(record.params)
    return (index if changed > REWRITE_SHARE * rows else None), params


def _open_ivf(record: IndexRecord, table: VectorTable, exact: FlatIndex, device: str) -> VectorIndex:
    from ragkit.retrieval.ivf_index import IvfIndex, bring_up_to_date

    index = _read(record, table.dim)
    changed = bring_up_to_date(index, table.row_ids, exact)
    if changed:
        logger.info("brought the vector index of generation %d up to date: %d rows", record.generation, changed)
    return IvfIndex(index, exact, int(record.params.get("nprobe") or 1), device)


def _read(record: IndexRecord, dim: int) -> Any:
    from ragkit.retrieval.faiss_runtime import import_faiss, read_index

    faiss = import_faiss()
    index = read_index(record.path)
    fits = isinstance(index, faiss.IndexIVFFlat) and index.d == dim and index.ntotal == record.rows
    if not fits or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise StoreCorruptError(
            f"the vector index {record.path} holds a {type(index).__name__} of {index.ntotal} x {index.d}, the store's "
            f"record says {record.rows} x {dim}; the next ingest makes it again"
        )
    return index


def _exact(table: VectorTable) -> FlatIndex:
    return FlatIndex(table.row_ids, [part.vectors for part in table.parts])
