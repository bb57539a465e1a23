"""Rows of answers as they are written: JSON Lines, or Parquet with one column a key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.answers.json_form import answer_json
from ragkit.credentials import public_url
from ragkit.errors import UsageError
from ragkit.jobs.openai_batch import openai_answer
from ragkit.jobs.rows import RowOutcome, RowShape
from ragkit.readers.file_systems import is_url

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1024
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}


def output_kind(out: str) -> str:
    """Return `jsonl` or `parquet`.

    Raises:
        UsageError: the ending is another.
    """
    ending = Path(out.partition("?")[0]).suffix.lower()
    if ending not in _KINDS:
        shown = public_url(out) if is_url(out) else out
        raise UsageError(f"--out must end in {', '.join(_KINDS)}, got {shown!r}")
    return _KINDS[ending]


def row_bytes(outcome: RowOutcome, created: int) -> bytes:
    """Return the JSON of an output row; `created` is the time that OpenAI's shape asks for."""
    row = openai_answer(outcome, created) if outcome.row.shape is RowShape.OPENAI else plain_row(outcome)
    # A model may emit half a surrogate pair; escaped it is valid JSON, as itself it could not be encoded.
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False).encode()


def plain_row(outcome: RowOutcome) -> dict[str, Any]:
    """Return ragkit's own row: the id with the answer, or with the error."""
    if outcome.answer is not None:
        return {"id": outcome.row.row_id, **answer_json(outcome.answer)}
    assert outcome.error is not None, "an outcome has an answer or an error"
    return {"id": outcome.row.row_id, "error": {"code": outcome.error.code, "message": outcome.error.message}}


def write_rows(path: Path, rows: Iterable[bytes], kind: str) -> None:
    """Write output rows, given as JSON, to a file of this kind."""
    if kind == "parquet":
        _write_parquet(path, (json.loads(row) for row in rows))
        return
    with path.open("wb") as file:
        for row in rows:
            file.write(row + b"\n")


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, _BATCH_ROWS)):
            shaped = [_columns(row, schema.names) for row in batch]
            try:
                table = pa.Table.from_pylist(shaped, schema=schema)
            except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold and Parquet may not
                table = pa.Table.from_pylist(_encodable(shaped), schema=schema)
            writer.write_table(table)


def _encodable(value: Any) -> Any:
    """Return a value of JSON with what no UTF-8 can hold escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(one) for key, one in value.items()}
    return type(value)(map(_encodable, value)) if isinstance(value, list | tuple) else value


def _columns(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    values = {name: row.get(name) for name in names}
    values["id"] = str(row["id"])
    if row.get("timings_ms") is not None:
        values["timings_ms"] = list(row["timings_ms"].items())
    if row.get("kv") is not None:
        values["kv"] = {**row["kv"], "bytes_by_tier": list(row["kv"]["bytes_by_tier"].items())}
    return values


def _schema() -> pa.Schema:
    import pyarrow as pa

    text, whole, number = pa.string(), pa.int64(), pa.float64()
    citation = {"uri": text, "page": whole, "char_start": whole, "char_stop": whole, "quote": text, "score": number}
    span = {"token_start": whole, "token_stop": whole, "char_start": whole, "char_stop": whole, "share": number}
    usage = dict.fromkeys(("prompt", "reused", "recomputed", "generated"), whole)
    kv = {"hits": whole, "misses": whole, "holes": whole, "bytes_by_tier": pa.map_(text, whole), "recomputed": whole}
    draft = {"mode": text, "drafter": text, "drafted": whole, "accepted": whole, "steps": whole, "ms_per_step": number}
    return pa.schema(
        {
            "id": text,
            "answer": text,
            "found": pa.bool_(),
            "citations": pa.list_(_struct({**citation, "doc_id": text})),
            "strategy": text,
            "model": text,
            "tokens": _struct(usage),
            "dropped_chunks": pa.list_(text),
            "warnings": pa.list_(text),
            "kv": _struct(kv),
            "draft": _struct(draft),
            "timings_ms": pa.map_(text, number),
            "attended": pa.list_(_struct(span)),
            "error": _struct({"code": text, "message": text}),
        }
    )


def _struct(fields: dict[str, pa.DataType]) -> pa.DataType:
    import pyarrow as pa

    return pa.struct(list(fields.items()))
