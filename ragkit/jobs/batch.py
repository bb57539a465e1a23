"""One `ragkit batch` from end to end: rows read and checked, the job begun or gone on with, answered, published.

A row that is reported as done lies synced in the job's folder; the output appears when all rows are done. Whatever ends
the process, the same command goes on with the rows that are not.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Literal

from ragkit.answers.options import QuestionChanges, document_uri
from ragkit.draft_config import DRAFTERS
from ragkit.errors import JobError, UsageError
from ragkit.jobs.answer_rows import output_kind, row_bytes, write_rows
from ragkit.jobs.batch_manifest import differences, manifest_of, read_manifest, row_differences
from ragkit.jobs.batch_report import BatchReport, Tally
from ragkit.jobs.job_folder import JobFolder, open_job_folder
from ragkit.jobs.question_files import STDIN, lies_elsewhere, local_path
from ragkit.jobs.result_log import ResultLog
from ragkit.jobs.rows import QuestionRow, RowOutcome
from ragkit.jobs.spooled_rows import SpooledRows, spooled_rows
from ragkit.jobs_config import ExecutorName
from ragkit.progress import Progress, Silent
from ragkit.readers.file_systems import refuse_network
from ragkit.types import MetadataValue

if TYPE_CHECKING:
    from ragkit.parts import Parts

#: Answers rows, as `answer_many` does; whatever runs a batch is one of these.
AnswerRows = Callable[[Iterable[QuestionRow]], Iterator[RowOutcome]]


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What a batch is asked for.

    Attributes:
        questions: a file of rows: a path, `-`, or an fsspec URL.
        out: the output: a path or an fsspec URL that ends in .jsonl or .parquet.
        limit: only the first rows; None for all.
        overwrite: replace an output that is there, and a job that was begun with other rows or settings.
        filter, document, ratio: hold for every row that does not say otherwise; a ratio where a row is or may be
            blended, and answers say where it had no part.
    """

    questions: str
    out: str
    limit: int | None = None
    overwrite: bool = False
    filter: Mapping[str, MetadataValue] | None = None
    document: str | None = None
    ratio: float | Literal["auto"] | None = None

    def check(self, parts: Parts) -> None:
        """Check what no row can mend, before anything is read or written.

        Raises:
            OfflineError: a file of the job would have to be fetched, and fetching is switched off.
            UsageError: the answers would replace the questions, or the store does not hold `document`.
            ModelError: there is no such model as the one that drafts for every row.
        """
        if parts.config.offline:
            for name in filter(lies_elsewhere, (self.questions, self.out)):
                refuse_network(name)
        if _place(self.questions) == _place(self.out):
            raise UsageError(f"--out {self.questions!r} is the file of questions; give another")
        if self.document is not None:
            document_uri(parts, self.document)
        drafter = parts.config.draft.drafter
        if drafter not in DRAFTERS:
            from ragkit.models import resolve

            resolve(drafter, offline=parts.config.offline)

    def rows(self, kind: str) -> contextlib.AbstractContextManager[SpooledRows]:
        """Give the rows, to be answered in an output of this kind; errors as of `spooled_rows`."""
        defaults = QuestionChanges(filter=self.filter, document=self.document, ratio=self.ratio)
        return spooled_rows(self.questions, defaults, self.limit, kind)


def run_batch(
    parts: Parts, job: BatchJob, *, progress: Progress | None = None, stop: Event | None = None
) -> BatchReport:
    """Answer all rows of `job` and return what was done; rows that an earlier run has done are not asked again.

    Raises:
        UsageError: the file of questions cannot be read, an id comes twice, an output is there already, or the job that
            was begun has other rows, settings, models or another store.
        ModelError: a model that the settings name cannot be loaded.
        JobError: the job that was begun cannot be read, or its files cannot be written.
        StoreLockedError: another process works on it.
        StoreSpaceError: the disk is full; what was done is kept.
    """
    stop = stop or Event()
    job.check(parts)
    kind = output_kind(job.out)
    started = time.perf_counter()
    _ = parts.store
    with open_job_folder(job.out) as folder, job.rows(kind) as rows:
        warnings = rows.warnings + _begin_or_go_on(parts, job, folder, rows, kind)
        log = folder.open_log(rows.count)
        with contextlib.closing(log):
            before, tally = log.done, Tally().add_all(log.rows())
            run = _Run(folder, log, progress or Silent(), tally)
            generated = tally.tokens["generated"]
            if log.done < rows.count and not stop.is_set():
                left = (row for row in rows if row.number not in log)
                run.answer(open_answers(parts, stop), left, rows.count - before)
            finished = log.done == rows.count
            if finished:
                folder.publish(lambda path: write_rows(path, log.rows(), kind))
            seconds = time.perf_counter() - started
            return BatchReport(
                out=folder.out,
                rows=rows.count,
                answered=tally.answered,
                not_found=tally.not_found,
                failed=tally.failed,
                resumed=before,
                failures=tuple(tally.failures),
                tokens=tally.tokens,
                kv=tally.kv,
                seconds=seconds,
                rows_per_second=(log.done - before) / seconds,
                tokens_per_second=(tally.tokens["generated"] - generated) / seconds,
                interrupted=not finished,
                warnings=tuple(warnings),
            )


def _place(name: str) -> str | Path:
    return name if name == STDIN or lies_elsewhere(name) else Path(local_path(name)).resolve()


def open_answers(parts: Parts, stop: Event) -> AnswerRows:
    """Return what answers rows over `parts`, here or on Ray, until `stop` is set."""
    if parts.config.jobs.engine is ExecutorName.RAY:
        from ragkit.jobs.ray_answering import answer_on_ray

        return lambda rows: answer_on_ray(parts, rows, stop)
    from ragkit.jobs.answering import answer_many

    return lambda rows: answer_many(parts, rows, stop=stop)


class _Run:
    """Answers rows and keeps them in groups."""

    def __init__(self, folder: JobFolder, log: ResultLog, progress: Progress, tally: Tally) -> None:
        self._folder = folder
        self._log = log
        self._progress = progress
        self._tally = tally
        self._group: list[tuple[int, bytes]] = []
        self._written = time.monotonic()

    def answer(self, answers: AnswerRows, rows: Iterable[QuestionRow], count: int) -> None:
        if self._log.done:
            self._progress.message(f"going on: {self._log.done:,} rows are done, {count:,} are left")
        self._progress.start(count, 0, "rows")
        outcomes = answers(rows)
        try:
            for outcome in outcomes:
                self._group.append((outcome.row.number, row_bytes(outcome, int(time.time()))))
                waited = time.monotonic() - self._written
                if len(self._group) >= self._folder.group_rows or waited >= self._folder.group_seconds:
                    self._write()
        finally:  # what is answered is kept, whatever ended the run
            self._write()
            if isinstance(outcomes, Generator):
                outcomes.close()  # now, not when the error that ended the run is forgotten: the store is closed before
            self._progress.close()

    def _write(self) -> None:
        group, self._group = self._group, []
        if group:
            self._folder.append(self._log, group)
            before = (self._tally.tokens["generated"], self._tally.kv["hits"], self._tally.kv["misses"])
            self._tally.add_all(row for _, row in group)
            now = (self._tally.tokens["generated"], self._tally.kv["hits"], self._tally.kv["misses"])
            tokens, hits, misses = (new - old for new, old in zip(now, before, strict=True))
            self._progress.advance(documents=len(group), tokens=tokens, hits=hits, misses=misses)
        self._written = time.monotonic()


def _begin_or_go_on(parts: Parts, job: BatchJob, folder: JobFolder, rows: SpooledRows, kind: str) -> list[str]:
    """Begin the job, or check that the one at hand is the same; return what is to be said about that."""
    begun = folder.manifest()
    now = manifest_of(parts, rows=rows.count, sha256=rows.sha256, output=kind)
    if begun is None:
        if folder.output_exists() and not job.overwrite:
            raise UsageError(f"{folder.out} is there already, and whole; --overwrite answers again and replaces it")
        folder.start(rows.path, json.dumps(now).encode())
        return []
    try:
        before = read_manifest(begun, folder.out)
        different = differences(before, now)
        if before["rows"] != now["rows"]:
            with folder.rows() as path:
                different += row_differences(path, rows.path)
        if different:
            raise UsageError(
                f"{folder.out} was begun by another job, which is not finished: {'; '.join(different)}. Run it as "
                "it was, or give --overwrite to begin anew"
            )
    except (UsageError, JobError):
        if not job.overwrite:
            raise
        folder.start(rows.path, json.dumps(now).encode())
        return []
    then, current = before["store"]["generation"], now["store"]["generation"]
    if then == current:
        return []
    return [
        f"the store changed since the job was begun (generation {then}, now {current}): earlier rows saw it as it was"
    ]
