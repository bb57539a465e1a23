"""Writes the chunks or the documents of a store as one Parquet file, here or at any fsspec URL.

The file is written as a stream, of one generation of the store, under a name of its own, and takes its real name when
it is whole: a reader finds the old file, the new one, or none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.errors import JobError, StoreSpaceError, UsageError
from ragkit.reports import ExportReport

if TYPE_CHECKING:
    from ragkit.store.base import StoreReader

_BATCH_ROWS = 4096
_BATCH_BYTES = 32 << 20


class ExportKind(StrEnum):
    """What is exported, one row each."""

    CHUNKS = "chunks"
    DOCUMENTS = "documents"


def export_store(
    store: StoreReader, target: str | Path, kind: ExportKind | str = ExportKind.CHUNKS, *, vectors: bool = False
) -> ExportReport:
    """Write `target` and return what it holds.

    Chunks have the columns `chunk_id`, `doc_id`, `uri`, `index`, `text`, `char_start`, `char_stop`, `token_count`,
    `page`, `metadata` (of the document, as JSON), `chunk_metadata` and, with `vectors`, `vector`; documents have `uri`,
    `source`, `doc_id`, `text`, `pages` and `metadata`, a row for each place in which one stands.

    Raises:
        UsageError: there is no such kind, documents are asked for with vectors, or the place cannot be written to.
        JobError: the file could not be written, or brought to its place.
        StoreSpaceError: the disk is full.
        StoreCorruptError: stored bytes rotted.
    """
    try:
        chosen = ExportKind(kind)
    except ValueError:
        raise UsageError(f"there is no export of {kind!r}; take one of {', '.join(ExportKind)}") from None
    if vectors and chosen is ExportKind.DOCUMENTS:
        raise UsageError("documents have no vectors, chunks do: export chunks, or leave the vectors out")
    with _placed(str(target)) as file, store.snapshot() as generation:
        schema = _schema(store, chosen, generation, vectors=vectors)
        rows = _chunk_rows(store, vectors=vectors) if chosen is ExportKind.CHUNKS else _document_rows(store)
        count = _write(file, schema, rows)
        size = file.stat().st_size
    from ragkit.readers.file_systems import stored_name

    return ExportReport(stored_name(str(target)), chosen.value, count, size, generation)


def _schema(store: StoreReader, kind: ExportKind, generation: int, *, vectors: bool) -> Any:
    import pyarrow as pa

    meta = store.meta
    facts = {"store_id": meta.store_id, "generation": generation, "embedder": meta.embedder_id, "chunker": meta.chunker}
    if kind is ExportKind.DOCUMENTS:
        page = pa.struct([("number", pa.int32()), ("char_start", pa.int64()), ("char_stop", pa.int64())])
        columns = [(name, pa.string()) for name in ("uri", "source", "doc_id", "text")]
        columns += [("pages", pa.list_(page)), ("metadata", pa.string())]
    else:
        columns = [(name, pa.string()) for name in ("chunk_id", "doc_id", "uri")]
        columns += [("index", pa.int32()), ("text", pa.string()), ("char_start", pa.int64()), ("char_stop", pa.int64())]
        columns += [("token_count", pa.int32()), ("page", pa.int32())]
        columns += [("metadata", pa.string()), ("chunk_metadata", pa.string())]
        if vectors:
            columns.append(("vector", pa.list_(pa.float32(), meta.dim)))
    return pa.schema(columns, metadata={"ragkit": json.dumps(facts)})


def _chunk_rows(store: StoreReader, *, vectors: bool) -> Iterator[Mapping[str, Any]]:
    import numpy as np

    from ragkit.retrieval.flat import FlatIndex, positions_of

    index = None
    if vectors:
        table = store.vectors()
        index = FlatIndex(table.row_ids, [part.vectors for part in table.parts])
    row_ids = store.row_ids()
    for start in range(0, len(row_ids), _BATCH_ROWS):
        some = row_ids[start : start + _BATCH_ROWS]
        taken = None if index is None else index.take(positions_of(table.row_ids, np.asarray(some)))
        for place, stored in enumerate(store.chunks(some)):
            chunk = stored.chunk
            row: dict[str, Any] = {
                "chunk_id": chunk.chunk_id,
                "doc_id": chunk.doc_id,
                "uri": _valid(stored.uri),
                "index": chunk.index,
                "text": _valid(chunk.text),
                "char_start": chunk.char_start,
                "char_stop": chunk.char_stop,
                "token_count": chunk.token_count,
                "page": chunk.page,
                "metadata": json.dumps(dict(stored.metadata)),
                "chunk_metadata": json.dumps(dict(chunk.metadata)),
            }
            yield row if taken is None else row | {"vector": taken[place]}


def _document_rows(store: StoreReader) -> Iterator[Mapping[str, Any]]:
    for record in store.sources():
        for link in store.source_documents(record.uri):
            document = store.document(link.doc_id)
            yield {
                "uri": _valid(link.uri),
                "source": _valid(record.uri),
                "doc_id": link.doc_id,
                "text": _valid(document.text),
                "pages": [
                    {"number": page.number, "char_start": page.char_start, "char_stop": page.char_stop}
                    for page in document.pages
                ],
                "metadata": json.dumps(dict(link.metadata)),
            }


def _valid(text: str) -> str:
    """Return `text` as UTF-8 can hold it: a lone surrogate, which a file name may have, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _write(file: Path, schema: Any, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write the rows in groups of a bounded size, and return how many there were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = held_bytes = 0
    held: list[Mapping[str, Any]] = []
    with _translated(file), pq.ParquetWriter(str(file), schema, compression="zstd") as writer:

        def flush() -> None:
            columns = [pa.array([row[field.name] for row in held], field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            held.clear()

        for row in rows:
            held.append(row)
            held_bytes += 4 * len(row["text"])
            count += 1
            if len(held) >= _BATCH_ROWS or held_bytes >= _BATCH_BYTES:
                flush()
                held_bytes = 0
        if held:
            flush()
    return count


@contextlib.contextmanager
def _translated(file: Path) -> Iterator[None]:
    """Say of which file an error of the operating system is: the snapshot around it would name the store."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreSpaceError(f"the export does not fit in {file.parent}: {reason}; make room there") from error
        raise JobError(f"the export could not be written in {file.parent}: {reason}") from error


@contextlib.contextmanager
def _placed(target: str) -> Iterator[Path]:
    """Give a file to be written, which takes the place of `target` when the block ends well and goes otherwise."""
    from ragkit.readers.file_systems import is_url, open_file_system

    if is_url(target):
        files, path = open_file_system(target)
        with tempfile.TemporaryDirectory(prefix="ragkit-export-") as folder:
            file = Path(folder) / "export.parquet"
            yield file
            _upload(target, files, path, file)
        return
    final = Path(os.path.abspath(target))
    if final.is_dir() or not final.parent.is_dir():
        what = "is a folder" if final.is_dir() else "stands in a folder that does not exist"
        raise UsageError(f"cannot write {target!r}: it {what}; give a file name")
    file = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    try:
        yield file
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.replace(final)
        folder_descriptor = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder_descriptor)
        finally:
            os.close(folder_descriptor)
    finally:
        file.unlink(missing_ok=True)


def _upload(target: str, files: Any, path: str, file: Path) -> None:
    from ragkit.credentials import public_url, safe_cause, without_credentials
    from ragkit.object_stores import appears_whole, make_folder
    from ragkit.readers.file_systems import move_file

    direct = appears_whole(files)
    part = path if direct else f"{path}.{secrets.token_hex(4)}.part"
    try:
        make_folder(files, path.rpartition("/")[0])
        files.put_file(str(file), part)
        if not direct:
            move_file(files, part, path)
    except Exception as error:  # every file system has errors of its own
        if not direct:
            with contextlib.suppress(Exception):
                files.rm_file(part)
        message = without_credentials(str(error) or type(error).__name__, target)
        raise JobError(f"{public_url(target)} could not be written: {message}") from safe_cause(error, target)
