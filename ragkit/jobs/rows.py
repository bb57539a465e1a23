"""Rows of a batch: one question with its options, and what became of it. Plain data that any executor can send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from ragkit.answers.options import QuestionChanges
from ragkit.errors import RagkitError
from ragkit.types import Answer

_CHANGES = tuple(item.name for item in fields(QuestionChanges))


class RowShape(StrEnum):
    """How a row is written: as ragkit's own, or as a line of an OpenAI batch file."""

    PLAIN = "plain"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no answer: a stable code and one line."""

    code: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> RowError:
        """Return what to report of `error`; one that ragkit did not raise on purpose is `internal`."""
        if isinstance(error, RagkitError):
            return cls(error.code, " ".join(str(error).split()))
        return cls("internal", " ".join(f"{type(error).__name__}: {error}".split()))


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """One row of a batch.

    Attributes:
        number: 0-based place among all rows, which is its place in the output.
        row_id: its `id`, or one made from its line.
        question: what is asked.
        changes: what it changes of the configuration.
        shape: how it was written, and is to be answered.
        error: why it cannot be asked; such a row goes to the output as it is.
    """

    number: int
    row_id: str | int
    question: str
    changes: QuestionChanges = field(default_factory=QuestionChanges)
    shape: RowShape = RowShape.PLAIN
    error: RowError | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON values, without what is empty."""
        changes = {name: getattr(self.changes, name) for name in _CHANGES}
        changes = {name: dict(v) if isinstance(v, Mapping) else v for name, v in changes.items() if v is not None}
        row = {"number": self.number, "id": self.row_id, "question": self.question, "shape": self.shape.value}
        return {**row, "changes": changes} | ({} if self.error is None else {"error": asdict(self.error)})

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> QuestionRow:
        """Return the row that `to_json` wrote."""
        error = row.get("error")
        return cls(
            row["number"],
            row["id"],
            row["question"],
            QuestionChanges(**row["changes"]),
            RowShape(row["shape"]),
            None if error is None else RowError(**error),
        )


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of one row: an answer or an error, never both.

    Attributes:
        row: the row.
        answer: its answer.
        error: why it has none.
        cut: the answer ended at `max_new_tokens`, not by itself.
    """

    row: QuestionRow
    answer: Answer | None = None
    error: RowError | None = None
    cut: bool = False
