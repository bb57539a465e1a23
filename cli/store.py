"""`ragkit ls`, `rm`, `status`, `gc` and `verify`: what the store holds, and looking after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.common import Session, command
from ragkit.cli.errors import ExitCode
from ragkit.cli.output import human_bytes, one_line, table, without_uri

if TYPE_CHECKING:
    from ragkit.reports import KVStatus
    from ragkit.store.base import SourceRecord, StoreCounts, StoreMeta, VerifyReport


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("ls")(command(ls))
    app.command("rm")(command(rm))
    app.command("status")(command(status))
    app.command("gc")(command(gc))
    app.command("verify")(command(verify))


def ls(session: Session) -> None:
    """List the sources of the store."""
    with session.open(session.settings()) as pipeline:
        records = pipeline.documents()
    rows = [(record.uri, str(record.status), record.documents, record.chunks, record.size) for record in records]
    lines = table(("SOURCE", "STATUS", "DOCUMENTS", "CHUNKS", "BYTES"), rows) if rows else ("the store is empty",)
    session.output.result({"sources": [_source_json(record) for record in records]}, lines)


def rm(
    session: Session,
    uris: Annotated[list[str], typer.Argument(metavar="SOURCE", help="Sources as `ragkit ls` shows them, or paths.")],
    erase: Annotated[bool, typer.Option("--erase", help="Also overwrite their text, vectors and KV on disk.")] = False,
) -> None:
    """Forget sources. Their files are not touched."""
    with session.open(session.settings()) as pipeline:
        removed = pipeline.remove(uris, erase=erase)
    done = "erased" if erase else "removed"
    session.output.result({"removed": list(removed), "erased": erase}, (f"{done} {one_line(uri)}" for uri in removed))


def status(session: Session) -> None:
    """Say what the store holds, and which sources failed."""
    settings = session.settings()
    with session.open(settings) as pipeline:
        meta, counts = pipeline.status()
        kv = pipeline.kv_status()
        bad = [record for record in pipeline.documents() if record.status != "ok"]
    data = {
        "store": str(settings.store),
        **asdict(counts),
        "embedder": meta.embedder_id,
        "dim": meta.dim,
        "chunker": meta.chunker,
        "format_version": meta.format_version,
        "kv": asdict(kv),
        "failed_sources": [_source_json(record) for record in bad],
    }
    session.output.result(data, _status_lines(str(settings.store), meta, counts, kv, bad))


def gc(
    session: Session,
    unused_kv: Annotated[
        bool,
        typer.Option("--unused-kv", help="Also remove chunk KV of other settings (model, codec, context)."),
    ] = False,
) -> None:
    """Remove files that nothing references any more."""
    with session.open(session.settings()) as pipeline:
        report = pipeline.gc(unused_kv=unused_kv)
    lines = [
        f"freed {human_bytes(report.bytes_freed)}: {report.removed_files:,} files removed, "
        f"{report.rewritten_segments:,} segments rewritten"
    ]
    if report.pending_files:
        lines.append(f"{report.pending_files:,} files are still read by another process; the next gc removes them")
    session.output.result(asdict(report), lines)


def verify(
    session: Session,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mark the sources of damaged parts, so that the next ingest reads them.")
    ] = False,
) -> None:
    """Check every stored byte against its checksum. Exits with 4 where something is damaged."""
    with session.open(session.settings()) as pipeline:
        report = pipeline.verify(repair=repair)
    session.output.result(_verify_json(report), _verify_lines(report))
    if report.problems:
        raise typer.Exit(ExitCode.STORE)


def _source_json(record: SourceRecord) -> dict[str, Any]:
    return {
        "uri": record.uri,
        "status": str(record.status),
        "documents": record.documents,
        "chunks": record.chunks,
        "bytes": record.size,
        "sha256": record.content_sha256,
        "media_type": record.media_type,
        "reader": record.reader,
        "failure": None if record.failure is None else {**asdict(record.failure), "attempts": record.attempts},
    }


def _status_lines(
    folder: str, meta: StoreMeta, counts: StoreCounts, kv: KVStatus, bad: Sequence[SourceRecord]
) -> Iterator[str]:
    yield f"store       {one_line(folder)}  (generation {counts.generation:,}, format {meta.format_version})"
    yield f"sources     {counts.sources:,}  ({counts.failed:,} failed, {counts.damaged:,} damaged)"
    yield f"documents   {counts.documents:,}"
    yield f"chunks      {counts.chunks:,}  ({counts.tokens:,} tokens)"
    yield f"on disk     {human_bytes(counts.bytes_on_disk)}  ({counts.segments:,} segments)"
    yield f"chunk KV    {_kv_line(kv, counts)}"
    yield f"embedder    {meta.embedder_id or '-'}  ({meta.dim:,} dimensions)"
    yield f"chunker     {meta.chunker or '-'}"
    if kv.other_bytes:
        yield "`ragkit gc --unused-kv` removes the chunk KV of other settings"
    for record in bad:
        failure = record.failure
        reason = f"({failure.code}): {without_uri(failure.message, record.uri)}" if failure else ""
        yield f"{record.status} {one_line(record.uri)} {reason}".rstrip()
    if any(record.failure for record in bad):
        yield "`ragkit ingest SOURCE --retry-failed` tries failed sources again"


def _kv_line(kv: KVStatus, counts: StoreCounts) -> str:
    tiers = ", ".join(f"{human_bytes(count)} on {name}" for name, count in kv.bytes_by_tier.items())
    pages = f", {human_bytes(kv.page_bytes)} of it pages of documents" if kv.page_bytes else ""
    others = f", {human_bytes(kv.other_bytes)} of it of other settings" if kv.other_bytes else ""
    unknown = f", {human_bytes(kv.unknown_bytes)} of it of unknown use: the generator is not at hand"
    others = unknown if kv.unknown_bytes else others
    chunks = "an unknown part" if kv.unknown_bytes else f"{kv.chunks:,}"
    line = f"{chunks} of {counts.chunks:,} chunks, {tiers}{pages}{others}"
    if kv.estimated_bytes is None:
        return line
    return f"{line}  (all would take about {human_bytes(kv.estimated_bytes)} as {kv.codec})"


def _verify_json(report: VerifyReport) -> dict[str, Any]:
    data = asdict(report)
    for problem in data["problems"]:
        del problem["key"]  # a row number of the catalogue means nothing outside
    return data


def _verify_lines(report: VerifyReport) -> Iterator[str]:
    checked = f"{report.documents:,} documents, {report.chunks:,} chunks, {human_bytes(report.bytes_read)}"
    if not report.problems:
        yield f"no damage: {checked} checked at generation {report.generation:,}"
        return
    yield f"{len(report.problems):,} problems: {checked} checked at generation {report.generation:,}"
    for problem in report.problems:
        yield f"{problem.part} {one_line(problem.name)}: {one_line(problem.message)}; {one_line(problem.remedy)}"
        for uri in problem.uris:
            yield f"    {one_line(uri)}"
    if report.marked:
        yield f"{len(report.marked):,} sources are marked; the next ingest of them reads them again"
