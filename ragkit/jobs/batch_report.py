"""What a batch did: counts of rows, tokens and chunk KV, with the keys of the command line's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_NAMED_FAILURES = 100


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A row without an answer: its id, a stable code and one line."""

    id: str | int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one batch did.

    Attributes:
        out: the output.
        rows: rows of the job.
        answered, not_found, failed: how they ended; `not_found` are answers that say that nothing supports one.
        resumed: rows that were done before this run.
        failures: the first of the failed rows.
        tokens, kv: sums over all answers, with the keys of an answer's.
        seconds: this run took.
        rows_per_second, tokens_per_second: of this run; the tokens are those generated.
        interrupted: a stop was asked for; what is counted is kept, and the same command goes on with the rest.
        warnings: one line each.
    """

    out: str
    rows: int
    answered: int = 0
    not_found: int = 0
    failed: int = 0
    resumed: int = 0
    failures: tuple[FailedRow, ...] = ()
    tokens: dict[str, int] = field(default_factory=dict)
    kv: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    rows_per_second: float = 0.0
    tokens_per_second: float = 0.0
    interrupted: bool = False
    warnings: tuple[str, ...] = ()


class Tally:
    """Counts output rows."""

    def __init__(self) -> None:
        self.answered = self.not_found = self.failed = 0
        self.failures: list[FailedRow] = []
        self.tokens = dict.fromkeys(("prompt", "reused", "recomputed", "generated"), 0)
        self.kv = dict.fromkeys(("hits", "misses"), 0)

    def add(self, row: bytes) -> None:
        """Count one row, given as it is written."""
        values: dict[str, Any] = json.loads(row)
        if values.get("error") is not None:
            self.failed += 1
            if len(self.failures) < _NAMED_FAILURES:
                row_id = values["custom_id"] if "custom_id" in values else values["id"]
                self.failures.append(FailedRow(row_id, values["error"]["code"], values["error"]["message"]))
            return
        answer = values["response"]["body"]["ragkit"] if "response" in values else values
        self.answered += 1
        self.not_found += not answer["found"]
        for sums, part in ((self.tokens, answer["tokens"]), (self.kv, answer["kv"])):
            for name in sums:
                sums[name] += part[name]

    def add_all(self, rows: Iterable[bytes]) -> Tally:
        """Count many and return this tally."""
        for row in rows:
            self.add(row)
        return self
