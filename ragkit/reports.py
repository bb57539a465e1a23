"""What the pipeline's calls return, apart from answers: plain data with the keys of the command line's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class FailedSource:
    """A source that could not be ingested: where it is, what it was doing, a stable code and one line."""

    uri: str
    stage: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What one ingest did. Counts are sources (files), except `chunks` and `tokens`, which are newly written.

    `relinked` sources were renamed: linked again without reading. `skipped` files stood in a given folder and are of no
    readable kind (pictures, say), which is no failure; a file that was named itself is one. `interrupted` is True when
    a stop was asked for; everything counted is committed, and the same command goes on with the rest.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    relinked: int = 0
    removed: int = 0
    skipped: int = 0
    failed: tuple[FailedSource, ...] = ()
    chunks: int = 0
    tokens: int = 0
    seconds: float = 0.0
    dry_run: bool = False
    interrupted: bool = False
    warnings: tuple[str, ...] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result with its text and place."""

    rank: int
    score: float
    uri: str
    page: int | None
    char_start: int
    char_stop: int
    text: str
    chunk_id: str


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Ranked hits and what each step took."""

    hits: tuple[Hit, ...]
    timings_ms: Mapping[str, float]
    warnings: tuple[str, ...] = ()
