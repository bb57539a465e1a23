"""`ragkit export`: the store's chunks or documents as one Parquet file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ragkit.cli.common import Session, command
from ragkit.cli.output import human_bytes, one_line


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("export")(command(export))


def export(
    session: Session,
    target: Annotated[str, typer.Argument(metavar="FILE", help="Where to: a path or a URL, usually *.parquet.")],
    documents: Annotated[bool, typer.Option("--documents", help="Whole documents instead of chunks.")] = False,
    vectors: Annotated[bool, typer.Option("--vectors", help="Also the chunks' vectors.")] = False,
) -> None:
    """Write the chunks or the documents of the store as a Parquet file, which appears when it is whole."""
    with session.open(session.settings()) as pipeline:
        report = pipeline.export(target, kind="documents" if documents else "chunks", vectors=vectors)
    line = f"{report.rows:,} {report.kind} in {one_line(report.target)}, {human_bytes(report.bytes)}"
    session.output.result(asdict(report), (line,))
