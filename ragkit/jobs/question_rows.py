"""From records to rows: ids, options and questions checked one row at a time, so that a bad row is its own error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ragkit.answers.options import QuestionChanges
from ragkit.config import AUTO, Strategy
from ragkit.errors import UsageError
from ragkit.jobs.column_hints import named_columns
from ragkit.jobs.openai_batch import is_openai, openai_question
from ragkit.jobs.question_files import Record
from ragkit.jobs.rows import QuestionRow, RowError, RowShape
from ragkit.types import MetadataValue


class RowReader:
    """Turns records into rows. `defaults` holds for every row that does not say otherwise; a row's filter adds to it.

    Attributes:
        unknown: how often each column came that means nothing here.
        questionless: how many rows have nothing under `question`.
        unreadable: how many rows could not be read at all, and
        first_problem: why the first of them could not.
        other_models: how often OpenAI lines asked for each model.
    """

    def __init__(self, defaults: QuestionChanges | None = None) -> None:
        self._defaults = defaults or QuestionChanges()
        self.unknown: Counter[str] = Counter()
        self.questionless = 0
        self.unreadable = 0
        self.first_problem = ""
        self._shape = RowShape.PLAIN  # of the last row that could be read: who reads one kind of lines gets one kind
        self.other_models: Counter[str] = Counter()

    def rows(self, records: Iterable[Record]) -> Iterator[QuestionRow]:
        """Yield a row a record, numbered from 0."""
        for number, record in enumerate(records):
            yield self._row(number, record)

    def remarks(self) -> Iterator[str]:
        """Yield what is to be said about the rows as a whole, after they were read."""
        if self.unknown:
            yield f"columns that mean nothing to a batch were left out: {named_columns(self.unknown, KNOWN_COLUMNS)}"

    def _row(self, number: int, record: Record) -> QuestionRow:
        made = f"row-{record.line}"
        if record.values is None:
            self.unreadable += 1
            self.first_problem = self.first_problem or record.problem
            return QuestionRow(number, made, "", shape=self._shape, error=RowError("corrupt", record.problem))
        self._shape = shape = RowShape.OPENAI if is_openai(record.values) else RowShape.PLAIN
        row = QuestionRow(number, made, "", shape=shape)
        try:
            given = record.values.get("custom_id" if shape is RowShape.OPENAI else "id")
            row = replace(row, row_id=made if given is None or given == "" else _id(given))
            values: Mapping[str, Any] = record.values
            if shape is RowShape.OPENAI:
                values, model = openai_question(values)
                self.other_models.update([model] if model else [])
            self.unknown.update(name for name in values if name not in KNOWN_COLUMNS)
            question = values.get("question")
            self.questionless += question is None
            if not isinstance(question, str) or not question.strip():
                raise UsageError(f"a row needs a question, got {question!r}")
            changes = {
                name: convert(name, values[name])
                for name, convert in _CONVERTERS.items()
                if values.get(name) is not None
            }
            return replace(row, question=question, changes=self._merged(changes))
        except UsageError as error:
            return replace(row, error=RowError.of(error))

    def _merged(self, changes: dict[str, Any]) -> QuestionChanges:
        if self._defaults.filter is not None:
            changes["filter"] = {**self._defaults.filter, **changes.get("filter", {})}
        if changes.get("strategy", Strategy.AUTO) not in (Strategy.AUTO, Strategy.BLEND):
            changes.setdefault("ratio", None)  # the ratio of all rows is not of one that recomputes no part
        return replace(self._defaults, **changes)


def duplicate_ids(rows: Iterable[QuestionRow], only: set[int]) -> dict[str, list[int]]:
    """Return the ids that come more than once, with the numbers of their rows; `only` holds the hashes that matter."""
    found: dict[str, list[int]] = {}
    for row in rows:
        if id_hash(row.row_id) in only:
            found.setdefault(str(row.row_id), []).append(row.number)
    return {row_id: numbers for row_id, numbers in found.items() if len(numbers) > 1}


def id_hash(row_id: str | int) -> int:
    """Return 64 bits of an id; `7` and `"7"` are the same id."""
    import hashlib

    digest = hashlib.blake2b(str(row_id).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _id(value: Any) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"an id is a text or a whole number, got {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a text, got {value!r}")
    return value


def _whole(name: str, given: Any) -> int:
    value = given
    try:
        if isinstance(value, str) and "." in value:  # a table with empty cells is often written with numbers like 4.0
            value = float(value)
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return int(value)
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"{name} must be a whole number, got {given!r}") from None


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"{name} must be a number, got {value!r}") from None


def _ratio(name: str, value: Any) -> float | str:
    return AUTO if value == AUTO else _number(name, value)


def _filter(name: str, value: Any) -> dict[str, MetadataValue]:
    """Return a filter: an object, the JSON text of one, or `K=V` in a column of text."""
    if isinstance(value, str):
        key, equals, wanted = value.partition("=")
        if value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise UsageError(f"{name} is not JSON: {error}") from error
        elif equals and key:
            value = {key: wanted}
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)  # a map column of Parquet
    if not isinstance(value, dict) or not all(
        isinstance(key, str) and isinstance(one, str | int | float | bool | None) for key, one in value.items()
    ):
        raise UsageError(f'{name} must be an object such as {{"year": 2023}}, or K=V, got {value!r}')
    return {key: one for key, one in value.items() if one is not None}


_CONVERTERS: dict[str, Callable[[str, Any], Any]] = {
    "k": _whole,
    "strategy": _text,
    "ratio": _ratio,
    "filter": _filter,
    "document": _text,
    "system_prompt": _text,
    "max_new_tokens": _whole,
    "temperature": _number,
    "top_p": _number,
    "seed": _whole,
    "draft": _text,
    "draft_mode": _text,
}
KNOWN_COLUMNS = frozenset({"id", "question", *_CONVERTERS})
