"""Ingest: plan, prepare, commit. Everything that is reported as done is committed.

A commit group holds one large source or many small ones. Until its transaction the store shows the old state of each
of its sources, so a crash costs at most the group at hand, and the same command goes on with the rest. The groups of a
source that comes in parts become visible with its last one; a crash costs it the part at hand as well.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from threading import Event

from ragkit.errors import ReadError
from ragkit.jobs.executor import Executor, PreparedGroup, StopRequested, Watch
from ragkit.jobs.plan import Action, IngestPlan, PlannedSource, Recipes
from ragkit.jobs.steps import FailedPreparation, PreparedSource, SourceFacts
from ragkit.progress import Progress
from ragkit.reports import FailedSource, IngestReport
from ragkit.store.base import IndexedDocument, SourceFailure, SourceStatus, SourceUpdate, StoreReader, StoreWriter

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tally:
    """What has been committed so far."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    skipped: int = 0
    chunks: int = 0
    tokens: int = 0
    failed: list[FailedSource] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    heirs: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"chunk": 0.0, "embed": 0.0, "embed_cpu": 0.0, "commit": 0.0}
    )


class Ingest:
    """One run over a plan: the committer of what an executor prepares. Not reusable."""

    def __init__(
        self,
        store: StoreReader,
        writer: StoreWriter,
        executor: Executor,
        recipes: Recipes,
        progress: Progress,
        stop: Event | None = None,
    ) -> None:
        self._store = store
        self._writer = writer
        self._executor = executor
        self._recipes = recipes
        self._progress = progress
        self._stop = stop or Event()
        self._tally = _Tally()
        self._done_already: set[str] = set()  # unchanged sources that come in parts

    def run(self, plan: IngestPlan) -> IngestReport:
        """Carry the plan out and return what was committed.

        Raises:
            StoreError: the store cannot be written (full disk, damage); everything committed before stays.
        """
        started = time.perf_counter()
        work = plan.of(Action.ADD, Action.UPDATE)
        self._progress.start(len(work), sum(item.source.size for item in work))
        self._relink(plan)
        for item in plan.of(Action.KNOWN_FAILURE):
            self._report_known_failure(item)
        removed = self._writer.remove(plan.removed) if plan.removed else ()
        try:
            for group in self._executor.prepare(work, self._is_known, Watch(self._progress, self._stop)):
                self._commit(group)
        except StopRequested:
            logger.info("stopped; what was read and not committed yet is left to the next run")
        tally = self._tally
        return IngestReport(
            added=tally.added,
            updated=tally.updated,
            unchanged=len(plan.of(Action.UNCHANGED)) + tally.unchanged,
            relinked=len(plan.of(Action.RELINK)),
            removed=len(removed),
            skipped=tally.skipped,
            failed=tuple(tally.failed),
            chunks=tally.chunks,
            tokens=tally.tokens,
            seconds=time.perf_counter() - started,
            interrupted=self._stop.is_set(),
            warnings=tuple(tally.warnings),
            timings_s=dict(tally.seconds),
        )

    @property
    def heirs(self) -> dict[str, str]:
        """Chunks that have the text of replaced ones now, by the id of the replaced one."""
        return self._tally.heirs

    def _relink(self, plan: IngestPlan) -> None:
        for item in plan.of(Action.RELINK):
            assert item.record is not None
            source = item.source
            self._writer.relink(item.record.uri, source.uri, size=source.size, mtime_ns=source.mtime_ns)
        for item in plan.of(Action.UNCHANGED):
            assert item.record is not None
            if (item.record.size, item.record.mtime_ns) != (item.source.size, item.source.mtime_ns):
                self._writer.touch(item.source.uri, size=item.source.size, mtime_ns=item.source.mtime_ns)

    def _report_known_failure(self, item: PlannedSource) -> None:
        failure = item.record.failure if item.record else None
        if failure is not None:
            message = f"{failure.message} (known; --retry-failed reads it again)"
            self._tally.failed.append(FailedSource(item.source.uri, failure.stage, failure.code, message))

    def _is_known(self, doc_id: str) -> bool:
        stored = self._store.document_recipe(doc_id)
        return self._recipes.same_chunks(self._writer.staged_recipe(doc_id) if stored is None else stored)

    def _commit(self, group: PreparedGroup) -> None:
        """Store what was prepared in one transaction, and record what failed."""
        for step, seconds in group.seconds.items():
            self._tally.seconds[step] = self._tally.seconds.get(step, 0.0) + seconds
        updates: list[SourceUpdate] = []
        read: list[PlannedSource] = []
        embedded: dict[str, IndexedDocument] = {}
        for item, outcome in group.outcomes:
            is_part = isinstance(outcome, PreparedSource) and outcome.more
            if outcome.facts is not None and not is_part:
                self._report_losses(item, outcome.facts)
            if isinstance(outcome, PreparedSource) and self._is_unchanged(item, outcome.facts):
                self._touch(item, outcome.facts)
            elif isinstance(outcome, PreparedSource):
                read += [] if is_part else [item]
                updates.append(self._update_of(item, outcome))
                embedded |= {one.document.doc_id: one for one in outcome.documents if isinstance(one, IndexedDocument)}
            elif _is_skipped(outcome):
                self._tally.skipped += 1
                self._progress.advance(documents=1, bytes=item.source.size)
            else:
                self._commit_failure(item, outcome.error)
        if not updates:
            return
        self._tally.tokens += sum(chunk.token_count for one in embedded.values() for chunk in one.chunks)
        started = time.perf_counter()
        report = self._writer.commit(updates)
        self._tally.seconds["commit"] += time.perf_counter() - started
        self._tally.added += len(report.added)
        self._tally.updated += len(report.updated)
        self._tally.chunks += report.rows
        self._tally.heirs.update(report.heirs)
        self._progress.advance(documents=len(read), bytes=sum(item.source.size for item in read))

    def _is_unchanged(self, item: PlannedSource, facts: SourceFacts) -> bool:
        """Return whether reading showed that nothing is new, where the place of the content could not say so."""
        record = item.record
        return (
            item.source.origin is not None
            and record is not None
            and record.status is SourceStatus.OK
            and record.content_sha256 == facts.content_sha256
            and record.recipe == self._recipes.of(facts.media_type)
        )

    def _touch(self, item: PlannedSource, facts: SourceFacts) -> None:
        source = facts.source
        if item.record is not None and (item.record.size, item.record.mtime_ns) != (source.size, source.mtime_ns):
            self._writer.touch(source.uri, size=source.size, mtime_ns=source.mtime_ns)
        if item.source.uri in self._done_already:
            return
        self._done_already.add(item.source.uri)
        self._tally.unchanged += 1
        self._progress.advance(documents=1, bytes=source.size)

    def _report_losses(self, item: PlannedSource, facts: SourceFacts) -> None:
        uri, rows = item.source.uri, facts.failed_rows
        self._tally.warnings.extend(f"{uri}: {warning}" for warning in facts.warnings)
        self._tally.failed.extend(FailedSource(f"{uri}#row={row.row}", "parse", row.code, row.message) for row in rows)
        if facts.failed_row_count > len(rows):
            self._tally.warnings.append(f"{uri}: {facts.failed_row_count - len(rows)} more rows failed")

    def _update_of(self, item: PlannedSource, prepared: PreparedSource) -> SourceUpdate:
        facts = prepared.facts
        source = facts.source  # as it was when it was read, which may be later than when it was found
        return SourceUpdate(
            uri=item.source.uri,
            content_sha256=facts.content_sha256,
            size=source.size,
            mtime_ns=source.mtime_ns,
            media_type=facts.media_type,
            reader=facts.reader,
            recipe=self._recipes.of(facts.media_type),
            documents=prepared.documents,
            more=prepared.more,
        )

    def _commit_failure(self, item: PlannedSource, error: ReadError) -> None:
        """Record why a source has no documents. What it had before stays visible."""
        source = item.source
        self._tally.failed.append(FailedSource(source.uri, error.stage, error.code, str(error)))
        self._progress.message(str(error) if source.uri in str(error) else f"{source.uri}: {error}")
        failure = SourceFailure(error.code, error.stage, str(error))
        self._writer.commit(
            [
                SourceUpdate(
                    uri=source.uri,
                    content_sha256=item.content_sha256,
                    size=source.size,
                    mtime_ns=source.mtime_ns,
                    recipe=self._recipes.of(""),
                    failure=failure,
                )
            ]
        )
        self._progress.advance(documents=1, bytes=source.size)


def _is_skipped(failure: FailedPreparation) -> bool:
    """Return whether the file only happens to lie in a folder, and is nothing that anyone reads."""
    return failure.error.code == "unsupported" and not failure.source.named
