"""A pipeline double for tests of the command line: it says what a `World` tells it to, and notes what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ragkit.config import PipelineConfig
from ragkit.errors import StoreMissingError
from ragkit.reports import ExportReport, Hit, IngestReport, KVStatus, SearchResult
from ragkit.store.base import (
    GcReport,
    Problem,
    SourceFailure,
    SourceRecord,
    SourceStatus,
    StoreCounts,
    StoreMeta,
    VerifyReport,
)
from ragkit.types import Answer, Citation, TokenUsage

QUOTE = "The tower is 330 metres tall."
ANSWER = Answer(
    text="It is 330 metres tall.",
    found=True,
    citations=(Citation("d" * 32, "/docs/tower.pdf", 3, 120, 149, QUOTE, 0.75),),
    strategy="full",
    model="tiny",
    tokens=TokenUsage(prompt=200, reused=0, recomputed=200, generated=5),
    timings_ms={
        "load_models": 900.0,
        "retrieve": 20.0,
        "load_kv": 0.0,
        "prefill": 50.0,
        "first_token": 75.0,
        "total": 115.0,
    },
)
RECORD = SourceRecord(
    uri="/docs/tower.pdf",
    content_sha256="ab" * 32,
    size=2_000_000,
    mtime_ns=0,
    media_type="application/pdf",
    reader="pdf",
    recipe="r",
    status=SourceStatus.OK,
    failure=None,
    attempts=0,
    indexed_sha256="ab" * 32,
    generation=2,
    documents=1,
    chunks=1234,
)
BROKEN = replace(
    RECORD,
    uri="/docs/broken.pdf",
    status=SourceStatus.FAILED,
    failure=SourceFailure("needs_ocr", "parse", "no text on any of 3 pages"),
    attempts=2,
    documents=0,
    chunks=0,
)


REPORT = IngestReport(added=2, unchanged=1, chunks=40, tokens=9000, seconds=1.25)


class FakeStream:
    """Yields an answer in three pieces."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        third = max(1, len(answer.text) // 3)
        self._pieces = [answer.text[:third], answer.text[third : 2 * third], answer.text[2 * third :]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)


@dataclass
class World:
    """What the double says, and what it was asked."""

    answer: Answer = ANSWER
    report: IngestReport = REPORT
    hits: tuple[Hit, ...] = (Hit(1, 0.0312, "/docs/tower.pdf", 3, 100, 400, f"A tower.\n{QUOTE}", "c" * 32),)
    records: list[SourceRecord] = field(default_factory=lambda: [BROKEN, RECORD])
    problems: tuple[Problem, ...] = ()
    kv_status: KVStatus = field(default_factory=lambda: KVStatus(1000, {"disk": 2_500_000_000}, "bf16", 3_100_000_000))
    store_exists: bool = True
    error: BaseException | None = None
    on_ingest: Callable[..., None] | None = None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    configs: list[PipelineConfig] = field(default_factory=list)
    stores: list[Path] = field(default_factory=list)

    def note(self, name: str, arguments: Mapping[str, Any]) -> None:
        self.calls.append((name, {key: value for key, value in arguments.items() if value is not None}))
        if self.error is not None:
            raise self.error


class FakePipeline:
    """A `Pipeline` over a `World`."""

    world: World

    @classmethod
    def open(cls, store: Path, config: PipelineConfig, *, create: bool = True) -> FakePipeline:
        cls.world.stores.append(store)
        cls.world.configs.append(config)
        if not cls.world.store_exists and not create:
            raise StoreMissingError(f"there is no store in {store}; `ragkit ingest SOURCE --store {store}` makes one")
        return cls()

    def __enter__(self) -> FakePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ingest(
        self,
        sources: Sequence[str],
        *,
        prune: bool,
        reembed: bool,
        retry_failed: bool,
        dry_run: bool,
        pages: bool,
        progress: Any,
        stop: Any,
    ) -> IngestReport:
        flags = {"prune": prune, "reembed": reembed, "retry_failed": retry_failed, "dry_run": dry_run, "pages": pages}
        self.world.note("ingest", {"sources": list(sources), **flags})
        if self.world.on_ingest is not None:
            self.world.on_ingest(progress, stop)
        return replace(self.world.report, dry_run=dry_run, interrupted=stop.is_set())

    def search(self, question: str, *, filter: Mapping[str, Any] | None = None) -> SearchResult:
        self.world.note("search", {"question": question, "filter": filter})
        return SearchResult(self.world.hits, {"retrieve": 12.0, "total": 12.5})

    def query(
        self, question: str, *, filter: Any = None, document: str | None = None, ratio: Any = None, progress: Any = None
    ) -> Answer:
        self.world.note("query", {"question": question, "filter": filter, "document": document})
        return self.world.answer

    def stream(
        self, question: str, *, filter: Any = None, document: str | None = None, ratio: Any = None, progress: Any = None
    ) -> FakeStream:
        self.world.note("stream", {"question": question, "filter": filter, "document": document})
        return FakeStream(self.world.answer)

    def documents(self) -> list[SourceRecord]:
        return self.world.records

    def remove(self, uris: Sequence[str], *, erase: bool) -> tuple[str, ...]:
        self.world.note("remove", {"uris": list(uris), "erase": erase})
        return tuple(uris)

    def status(self) -> tuple[StoreMeta, StoreCounts]:
        meta = StoreMeta(1, "s" * 32, "unicode61", "minilm@12", 384, "recursive", "f", "t")
        return meta, StoreCounts(7, 2, 1, 0, 1, 1234, 300_000, 3, 4_500_000)

    def export(self, target: str, *, kind: str, vectors: bool) -> ExportReport:
        self.world.note("export", {"target": target, "kind": kind, "vectors": vectors})
        return ExportReport(target, kind, 40, 12_345, 7)

    def kv_status(self) -> KVStatus:
        return self.world.kv_status

    def gc(self, *, unused_kv: bool) -> GcReport:
        self.world.note("gc", {"unused_kv": unused_kv})
        return GcReport(1_500_000, 3, 1, 0)

    def verify(self, *, repair: bool) -> VerifyReport:
        self.world.note("verify", {"repair": repair})
        marked = self.world.problems[0].uris if repair and self.world.problems else ()
        return VerifyReport(7, 1, 1234, 4_000_000, self.world.problems, marked)
