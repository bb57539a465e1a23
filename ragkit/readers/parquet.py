"""Parquet: one document a row, read in batches. Only plain types: extension types have run code (CVE-2023-47248)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ragkit.errors import ReadError
from ragkit.readers.base import ParseContext, Parsed
from ragkit.readers.media_type import MediaType
from ragkit.readers.table_rows import RowDocuments, find_text_column

_BATCH_ROWS = 64
_EXTENSION_KEY = b"ARROW:extension:name"


class ParquetReader:
    """Reads Parquet files of plain Arrow types."""

    name = "parquet"
    version = 1
    media_types = frozenset((MediaType.PARQUET,))

    def read(self, path: Path, context: ParseContext) -> Iterator[Parsed]:
        """Yield a document for each row that has text."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
                yield from _documents(file, context)
        except pa.ArrowMemoryError as error:
            raise MemoryError(str(error)) from error
        except (pa.ArrowException, OSError) as error:
            if "malloc" in str(error) or "allocate" in str(error):
                raise MemoryError(str(error)) from error
            encrypted = "encrypt" in str(error).lower() or "decrypt" in str(error).lower()
            raise ReadError(
                f"not readable as Parquet: {error}", code="encrypted" if encrypted else "corrupt"
            ) from error


def _documents(file: Any, context: ParseContext) -> Iterator[Parsed]:
    schema = file.schema_arrow
    for field in schema:
        refuse_extension(field, field.name)
    text_column = find_text_column(schema.names, context.text_column)
    columns = [field.name for field in schema if text_column is None or _is_scalar(field.type)]
    if text_column is not None and text_column not in columns:
        columns.append(text_column)
    builder = RowDocuments(context)
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
        for values in batch.to_pylist():
            number += 1
            found = builder.document(number, values, text_column)
            if found is not None:
                yield found
    yield from builder.remarks()


def refuse_extension(field: Any, path: str) -> None:
    """Raise where a field, or one nested in it, is of an extension type, known to this process or not."""
    import pyarrow as pa

    if isinstance(field.type, pa.BaseExtensionType) or _EXTENSION_KEY in (field.metadata or {}):
        raise ReadError(
            f"column {path!r} has an extension type; only plain types are read, so cast it before writing the file",
            code="unsupported",
        )
    for index in range(field.type.num_fields):
        child = field.type.field(index)
        refuse_extension(child, f"{path}.{child.name}")


def _is_scalar(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_scalar(kind.value_type)
    return not (
        types.is_nested(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
    )
