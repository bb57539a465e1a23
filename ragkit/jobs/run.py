"""One `Pipeline.ingest` call from end to end: sources found, plan made under the lock, work done, report returned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING

from ragkit.chunking.registry import create_chunker
from ragkit.jobs.discovery import find_sources, prune_roots
from ragkit.jobs.executor import open_cluster, open_executor
from ragkit.jobs.ingest import Ingest
from ragkit.jobs.plan import Action, IngestPlan, Recipes, plan_ingest
from ragkit.progress import Progress
from ragkit.readers.source import Findable
from ragkit.reports import FailedSource, IngestReport

if TYPE_CHECKING:
    from ragkit.chunking.base import Chunker
    from ragkit.jobs.ray_cluster import RayCluster
    from ragkit.parts import Parts
    from ragkit.store.base import StoreWriter


def run_ingest(
    parts: Parts,
    sources: Sequence[Findable],
    *,
    prune: bool,
    reembed: bool,
    retry_failed: bool,
    dry_run: bool,
    kv: bool,
    pages: bool,
    progress: Progress,
    stop: Event | None,
) -> IngestReport:
    """Return what `Pipeline.ingest` returns; arguments and errors are described there."""
    started = time.perf_counter()
    config = parts.config
    discovery = find_sources(sources, config.ingest, offline=config.offline)
    found, roots = discovery.sources, prune_roots(sources) if prune else []
    chunker = create_chunker(config.chunking, parts.tokenizer, parts)
    recipes = Recipes(chunker)
    if dry_run:
        store = parts.store if parts.has_store() else None
        plan = plan_ingest(store, found, recipes, retry_failed=retry_failed, prune_roots=roots)
        return _planned(plan, time.perf_counter() - started)
    store = parts.create_store()
    if not reembed:
        parts.check_embedder()
    with open_cluster(config.jobs) as cluster:
        with store.writer(lock_timeout_s=config.ingest.lock_timeout_s) as writer:
            # The plan is made under the lock: two ingests of the same folder must not both embed it.
            plan = plan_ingest(store, found, recipes, retry_failed=retry_failed, prune_roots=roots)
            _configure(parts, writer, chunker, reembed=reembed)
            with open_executor(parts, chunker, cluster) as executor:
                ingest = Ingest(store, writer, executor, recipes, progress, stop)
                try:
                    report = ingest.run(plan)
                finally:
                    progress.close()
                    parts.forget_removed(ingest.heirs)
        report = replace(report, warnings=discovery.warnings + report.warnings, failed=discovery.failed + report.failed)
        if kv and not report.interrupted:
            report = _with_kv(parts, report, cluster, progress, stop)
        if pages and not report.interrupted:
            report = _with_pages(parts, report, progress, stop)
    return replace(report, seconds=time.perf_counter() - started)


def _configure(parts: Parts, writer: StoreWriter, chunker: Chunker, *, reembed: bool) -> None:
    """Record what the commits are made with, and replace the vectors of another embedder if that is asked for."""
    embedder = parts.chunk_embedder
    if reembed and parts.store.meta.embedder_id not in ("", embedder.embedder_id):
        writer.reset_embeddings(embedder_id=embedder.embedder_id, dim=embedder.dim, embed=embedder.encode_chunks)
    writer.configure(
        embedder_id=embedder.embedder_id,
        dim=embedder.dim,
        chunker=chunker.name,
        chunker_fingerprint=chunker.fingerprint,
        tokenizer_id=parts.tokenizer.tokenizer_id,
    )


def _with_kv(
    parts: Parts, report: IngestReport, cluster: RayCluster | None, progress: Progress, stop: Event | None
) -> IngestReport:
    """Compute the KV of all chunks, now that the documents are committed and the store may be written by others."""
    started = time.perf_counter()
    try:
        if cluster is None:
            blending = parts.blending  # first: it imports torch
            from ragkit.jobs.kv_ingest import KVIngest

            done, warnings = KVIngest(parts.store, blending, progress, stop).run()
        else:
            from ragkit.jobs.ray_kv import RayKVIngest

            done, warnings = RayKVIngest(parts, cluster, progress, stop).run()
    finally:
        progress.close()
    return replace(
        report,
        kv=done,
        interrupted=stop is not None and stop.is_set(),
        warnings=report.warnings + warnings,
        timings_s={**report.timings_s, "kv": time.perf_counter() - started},
    )


def _with_pages(parts: Parts, report: IngestReport, progress: Progress, stop: Event | None) -> IngestReport:
    """Read the documents into pages that are longer than the generator's window."""
    started = time.perf_counter()
    try:
        parts.paging  # noqa: B018 (first: it imports torch, which may not be loaded by importing what reads)
        from ragkit.jobs.page_ingest import PageIngest

        done, warnings = PageIngest(parts, progress, stop).run()
    finally:
        progress.close()
    return replace(
        report,
        pages=done,
        interrupted=stop is not None and stop.is_set(),
        warnings=report.warnings + warnings,
        timings_s={**report.timings_s, "pages": time.perf_counter() - started},
    )


def _planned(plan: IngestPlan, seconds: float) -> IngestReport:
    """Return the report of a dry run: what a real one would try."""
    failures = [(item.source.uri, item.record.failure) for item in plan.of(Action.KNOWN_FAILURE) if item.record]
    return IngestReport(
        added=len(plan.of(Action.ADD)),
        updated=len(plan.of(Action.UPDATE)),
        unchanged=len(plan.of(Action.UNCHANGED)),
        relinked=len(plan.of(Action.RELINK)),
        removed=len(plan.removed),
        failed=tuple(
            FailedSource(uri, failure.stage, failure.code, failure.message) for uri, failure in failures if failure
        ),
        seconds=seconds,
        dry_run=True,
    )
