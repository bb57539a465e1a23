"""`ragkit ingest`: make the store hold these sources."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.common import CHUNKER_NAMES, Session, command, flag
from ragkit.cli.engine import EngineOption, RayAddressOption, engine_flags
from ragkit.cli.errors import ExitCode
from ragkit.cli.output import Output, human_bytes, one_line, without_uri
from ragkit.cli.progress import progress_for
from ragkit.cli.signals import finishing_first
from ragkit.errors import UsageError

if TYPE_CHECKING:
    from ragkit.reports import IngestReport

GO_ON = "stopped; everything counted is committed, and the same command goes on with the rest"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("ingest")(command(ingest))


def ingest(
    session: Session,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Files, folders, URLs (s3://, gs://, https://, postgresql://...?query=), - for stdin.",
        ),
    ] = None,
    chunker: Annotated[
        str | None, typer.Option("--chunker", metavar="NAME", help=f"How documents are cut: {CHUNKER_NAMES}.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, metavar="N", help="Most tokens of a chunk.")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option("--embedder", metavar="NAME", help="Embedding model: a name, folder or hub id.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="GLOB", help="Read only matching files. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Leave matching files out. Repeatable.")
    ] = None,
    sql: Annotated[
        str | None,
        typer.Option("--sql", metavar="QUERY", help="Read the rows of a query: columns id, text, and metadata."),
    ] = None,
    sql_url: Annotated[
        str | None, typer.Option("--sql-url", metavar="URL", help="The database that --sql asks. [env: RAGKIT_SQL_URL]")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Forget documents whose files are gone.")] = False,
    reembed: Annotated[
        bool, typer.Option("--reembed", help="Embed the whole store again, with this embedder.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try unchanged files again that failed.")
    ] = False,
    kv: Annotated[
        bool | None,
        typer.Option("--kv/--no-kv", help="Compute the KV of all chunks now, not when they are first used."),
    ] = None,
    pages: Annotated[
        bool,
        typer.Option(
            "--pages", help="Read documents longer than the model's window into pages now: see docs/pages.md."
        ),
    ] = False,
    lock_timeout: Annotated[
        float | None, typer.Option("--lock-timeout", metavar="S", help="Seconds to wait for another writer.")
    ] = None,
    engine: EngineOption = None,
    ray_address: RayAddressOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Read, cut, embed and index documents. Unchanged files are skipped; edited ones are replaced."""
    sources = [*(sources or []), *_sql_sources(sql, sql_url)]
    if not sources and not reembed and not kv and not pages:
        raise UsageError("ingest needs at least one SOURCE: a file, a folder, a URL, or - for stdin")
    settings = session.settings(
        {
            "chunking.chunker": flag(chunker, "--chunker"),
            "chunking.max_tokens": flag(max_tokens, "--max-tokens"),
            "embedding.model": flag(embedder, "--embedder"),
            "ingest.include": flag(include, "--include"),
            "ingest.exclude": flag(exclude, "--exclude"),
            "ingest.kv": flag(kv, "--kv" if kv else "--no-kv"),
            "ingest.lock_timeout_s": flag(lock_timeout, "--lock-timeout"),
            **engine_flags(engine, ray_address),
        }
    )
    progress = progress_for(session.output)

    def on_stop() -> None:
        progress.message("stopping after the running commit; once more stops at once")

    try:
        with finishing_first(on_stop) as request, session.open(settings, create=True) as pipeline:
            report = pipeline.ingest(
                sources,
                prune=prune,
                reembed=reembed,
                retry_failed=retry_failed,
                dry_run=dry_run,
                pages=pages,
                progress=progress,
                stop=request.event,
            )
    finally:
        progress.close()
    session.output.result(report_json(report), report_lines(report, session.output))
    if request.exit_code and report.interrupted:
        session.output.note(GO_ON)
        raise typer.Exit(request.exit_code)
    if report.failed or (report.kv is not None and report.kv.left_out):
        raise typer.Exit(ExitCode.PARTLY_DONE)


def _sql_sources(query: str | None, url: str | None) -> list[str]:
    """Return the source that `--sql` and `--sql-url` name; the environment keeps passwords out of process lists."""
    if query is None:
        if url is not None:
            raise UsageError("--sql-url names a database, and --sql QUERY what to read from it: give both")
        return []
    url = url or os.environ.get("RAGKIT_SQL_URL")
    if not url:
        raise UsageError("--sql asks a database: name it with --sql-url URL, or in RAGKIT_SQL_URL")
    from ragkit.readers import sql_source

    return [sql_source(url, query)]


def report_json(report: IngestReport) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    return asdict(report)


def report_lines(report: IngestReport, output: Output) -> Iterator[str]:
    """Yield what people read: the counts, then one line for each failure and warning."""
    counts = [("added", report.added), ("updated", report.updated), ("unchanged", report.unchanged)]
    counts += [("renamed", report.relinked), ("removed", report.removed)]
    counts += [("skipped", report.skipped), ("failed", len(report.failed))]
    shown = ", ".join(f"{count:,} {name}" for name, count in counts if count or name == "added")
    if report.dry_run:
        yield f"would be: {shown}"
    else:
        yield f"{shown}; {report.chunks:,} chunks, {report.tokens:,} tokens in {report.seconds:.1f} s"
    if report.kv is not None:
        done = report.kv
        shared = f", {done.shared:,} have the text of another" if done.shared else ""
        line = f"KV of {done.computed:,} chunks computed ({human_bytes(done.bytes)}), of {done.present:,} there already"
        yield line + shared
    if report.pages is not None:
        read = report.pages
        yield (
            f"{read.read:,} documents read into pages ({read.tokens:,} tokens, {human_bytes(read.bytes)}), "
            f"{read.present:,} there already"
        )
    for failure in report.failed:
        yield f"failed ({failure.code}): {one_line(failure.uri)}: {without_uri(failure.message, failure.uri)}"
    for warning in report.warnings:
        output.note(f"warning: {one_line(warning)}")
