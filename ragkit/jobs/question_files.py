"""Files of questions as records: JSON Lines, CSV and Parquet, local, at an fsspec URL or on standard input."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ragkit.credentials import public_url, safe_cause, without_credentials
from ragkit.errors import ReadError, StoreSpaceError, UsageError
from ragkit.jobs.column_hints import named_columns
from ragkit.jobs.result_log import no_room
from ragkit.readers.csv import MAX_FIELD_CHARS, SAMPLE_CHARS, header, layout, values_of
from ragkit.readers.encodings import detect_file
from ragkit.readers.file_systems import is_url, open_file_system, scheme_of
from ragkit.readers.jsonl import numbered_lines
from ragkit.readers.parquet import refuse_extension
from ragkit.readers.text_stream import open_text

STDIN = "-"
_BATCH_ROWS = 1024
_ENDINGS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".pq": "parquet",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file as it was written: its 1-based line (or row), and its values, or why it has none."""

    line: int
    values: Mapping[str, Any] | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """A file of questions at a local path, which is a copy where it came from elsewhere.

    `remarks` are filled while it is read: what could not be decoded.
    """

    name: str
    path: Path
    kind: str
    remarks: list[str]

    def records(self) -> Iterator[Record]:
        """Yield the rows in order.

        Raises:
            UsageError: the file as a whole cannot be read, or has no column `question`.
        """
        read = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}[self.kind]
        try:
            yield from read(self)
        except ReadError as error:
            raise UsageError(f"{self.name} cannot be read: {error}") from error


@contextlib.contextmanager
def open_questions(source: str, stdin: BinaryIO | None = None) -> Iterator[QuestionFile]:
    """Give the file of questions that a user named: a path, `-` for standard input (JSON Lines), or an fsspec URL.

    Raises:
        UsageError: there is none, or its ending says nothing of its kind.
        MissingExtraError: a URL needs a package that is not installed.
    """
    if source == STDIN:
        with _copied(lambda file: shutil.copyfileobj(stdin or sys.stdin.buffer, file)) as path:
            yield QuestionFile("standard input", path, "jsonl", [])
    elif lies_elsewhere(source):
        kind = _kind_of(source)
        with _copied(lambda file: _fetch(source, file)) as path:
            yield QuestionFile(public_url(source), path, kind, [])
    else:
        path = Path(local_path(source))
        if not path.is_file():
            raise UsageError(f"there is no file of questions {source!r}; give a .jsonl, .csv or .parquet file, or -")
        yield QuestionFile(source, path, _kind_of(source), [])


def lies_elsewhere(name: str) -> bool:
    """Return whether `name` is a URL of another file system than this machine's."""
    return is_url(name) and scheme_of(name) != "file"


def local_path(name: str) -> str:
    """Return the path of a file of this machine, which may be given as `file://...`."""
    return name.removeprefix("file://")


def _kind_of(name: str) -> str:
    ending = Path(name.partition("?")[0]).suffix.lower()
    if ending not in _ENDINGS:
        shown = public_url(name) if is_url(name) else name
        raise UsageError(f"{shown!r} must end in {', '.join(_ENDINGS)}, so that it is known how to read it")
    return _ENDINGS[ending]


@contextlib.contextmanager
def kept_in_scratch() -> Iterator[None]:
    """Say where there is no more room for what is kept while a file of questions is read.

    Raises:
        StoreSpaceError: the temporary folder is full.
    """
    try:
        yield
    except OSError as error:
        if full := no_room(error):
            raise StoreSpaceError(
                f"{full}: rows are kept in {tempfile.gettempdir()} while they are read; make room there, or name "
                "another folder in TMPDIR"
            ) from error
        raise


@contextlib.contextmanager
def _copied(write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ragkit-questions-") as folder:
        path = Path(folder) / "questions"
        with kept_in_scratch(), path.open("wb") as file:
            write(file)
        yield path


def _fetch(url: str, target: BinaryIO) -> None:
    files, path = open_file_system(url)
    shown = public_url(url)
    try:
        with files.open(path, "rb") as source:
            shutil.copyfileobj(source, target)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file of questions at {shown}") from safe_cause(error, url)
    except Exception as error:  # every file system has errors of its own
        raise UsageError(f"{shown} cannot be read: {without_credentials(str(error), url)}") from safe_cause(error, url)


def _jsonl(questions: QuestionFile) -> Iterator[Record]:
    path, read = questions.path, 0
    with open_text(path, detect_file(path), newline="\n") as stream:
        for number, line in numbered_lines(stream.file):
            if line is None:
                yield Record(number, None, "the line is too long to be read")
            elif line.strip():
                record = _json_record(number, line)
                if not read and record.problem and line.lstrip().startswith("["):
                    _refuse_array(questions, line)
                read += 1
                yield record
        questions.remarks.extend(remark.message for remark in stream.remarks())


def _refuse_array(questions: QuestionFile, line: str) -> None:
    """Raise `UsageError` where the first line begins an array that goes on below it."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(
            f"{questions.name} looks like one JSON array; give JSON Lines, one object a line (`jq -c '.[]'` makes them)"
        ) from None


def _json_record(number: int, line: str) -> Record:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Record(number, None, f"line {number} is not JSON: {error}")
    if not isinstance(values, dict):
        return Record(number, None, f"line {number} must hold an object with a question, got {type(values).__name__}")
    return Record(number, values)


def _csv(questions: QuestionFile) -> Iterator[Record]:
    path, encoding = questions.path, detect_file(questions.path)
    csv.field_size_limit(MAX_FIELD_CHARS)
    with open_text(path, encoding, newline="") as sample:
        delimiter, _ = layout(sample.file.read(SAMPLE_CHARS))
    with open_text(path, encoding, newline="") as stream:
        rows = csv.reader(stream.file, delimiter=delimiter)
        columns = header(next(rows, []))
        _check_columns(questions, columns)
        number = 0
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                number += 1
                yield Record(number, None, f"line {rows.line_num} is not CSV: {error}")
                continue
            if cells:
                number += 1
                yield Record(number, {name: cell for name, cell in values_of(columns, cells).items() if cell != ""})
        questions.remarks.extend(remark.message for remark in stream.remarks())


def _parquet(questions: QuestionFile) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(questions.path, memory_map=False, pre_buffer=False) as file:
            for field in file.schema_arrow:
                refuse_extension(field, field.name)
            _check_columns(questions, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(number, {name: value for name, value in values.items() if value is not None})
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{questions.name} is not readable as Parquet: {error}") from error


def _check_columns(questions: QuestionFile, columns: list[str]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UsageError(f"{questions.name} has more than one column {', '.join(map(repr, twice))}: leave one of them")
    if "question" not in columns:
        raise UsageError(f"{questions.name} has no column 'question'; it has {named_columns(columns, ('question',))}")
