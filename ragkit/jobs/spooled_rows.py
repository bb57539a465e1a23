"""The rows of a job in a file: read once, checked, counted and hashed, so that memory does not grow with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ragkit.answers.options import QuestionChanges
from ragkit.errors import UsageError
from ragkit.jobs.column_hints import named_columns
from ragkit.jobs.question_files import kept_in_scratch, open_questions
from ragkit.jobs.question_rows import KNOWN_COLUMNS, RowReader, duplicate_ids, id_hash
from ragkit.jobs.rows import QuestionRow, RowShape

_NAMED_IDS = 5


@dataclass(slots=True)
class SpooledRows:
    """The rows of a job in a file, one JSON a line, and what was noticed while they were read."""

    path: Path
    count: int
    sha256: str
    warnings: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[QuestionRow]:
        return read_rows(self.path)


@contextlib.contextmanager
def spooled_rows(source: str, defaults: QuestionChanges, limit: int | None, kind: str) -> Iterator[SpooledRows]:
    """Give the rows of a file of questions, each read and checked once.

    Args:
        source: a path, `-`, or an fsspec URL.
        defaults: hold for every row that does not say otherwise.
        limit: only the first rows; None for all.
        kind: of the output, `jsonl` or `parquet`.

    Raises:
        UsageError: an id comes twice, there are no rows, or they cannot be answered in an output of this kind.
        StoreSpaceError: there is no room for them.
    """
    reader = RowReader(defaults)
    with tempfile.TemporaryDirectory(prefix="ragkit-rows-") as scratch, open_questions(source) as questions:
        path = Path(scratch) / "rows.jsonl"
        digest, hashes, openai = hashlib.sha256(), array("Q"), 0
        with kept_in_scratch(), path.open("wb") as file:
            for row in islice(reader.rows(questions.records()), limit):
                line = json.dumps(row.to_json(), sort_keys=True).encode() + b"\n"
                file.write(line)
                digest.update(line)
                hashes.append(id_hash(row.row_id))
                openai += row.shape is RowShape.OPENAI
        if not hashes:
            raise UsageError(f"{questions.name} holds no rows")
        if reader.unreadable and reader.questionless + reader.unreadable == len(hashes):
            raise UsageError(f"no row of {questions.name} holds a question: {reader.first_problem}")
        if reader.questionless == len(hashes):
            columns = named_columns(reader.unknown, KNOWN_COLUMNS) or "none that means anything"
            raise UsageError(f"no row of {questions.name} has a column 'question'; other columns: {columns}")
        _refuse_duplicates(path, hashes)
        if openai and kind == "parquet":
            raise UsageError("OpenAI batch lines are answered in their own shape, in JSON Lines: give --out FILE.jsonl")
        warnings = [f"{questions.name}: {remark}" for remark in (*questions.remarks, *reader.remarks())]
        models = reader.other_models.items()
        for name, count in models:
            asking = f"{count:,} lines ask for" if count > 1 else "1 line asks for"
            warnings.append(f"{asking} {name!r}; the configured model answers")
        yield SpooledRows(path, len(hashes), digest.hexdigest(), warnings)


def read_rows(path: Path) -> Iterator[QuestionRow]:
    """Yield the rows of a spool."""
    with path.open("rb") as file:
        for line in file:
            yield QuestionRow.from_json(json.loads(line))


def _refuse_duplicates(path: Path, hashes: array[int]) -> None:
    import numpy as np

    values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    repeated = {int(value) for value in values[counts > 1]}
    found: dict[str, Any] = duplicate_ids(read_rows(path), repeated) if repeated else {}
    if found:
        named = (
            f"{row_id!r} (rows {', '.join(str(number + 1) for number in numbers[:_NAMED_IDS])})"
            for row_id, numbers in islice(found.items(), _NAMED_IDS)
        )
        more = f" and {len(found) - _NAMED_IDS:,} more" if len(found) > _NAMED_IDS else ""
        raise UsageError(f"ids must differ, and these come more than once: {', '.join(named)}{more}")
