"""`ragkit eval needle`: whether a sentence is found wherever it stands in a long document."""

from __future__ import annotations

from typing import Annotated

import typer

from ragkit.cli.common import Session, command
from ragkit.cli.eval_long import LongJob, LongOptions, evaluate, with_long_options


def register(group: typer.Typer) -> None:
    """Add the command to the group `eval`."""
    group.command("needle")(command(with_long_options(needle)))


def needle(
    session: Session,
    options: LongOptions,
    depths: Annotated[
        int, typer.Option("--depths", min=1, metavar="N", help="Places from the beginning to the end.")
    ] = 11,
    needles: Annotated[
        int, typer.Option("--needles", min=1, metavar="N", help="Random needles for each length and depth.")
    ] = 3,
    together: Annotated[
        bool,
        typer.Option("--together", help="All depths in one document, each with a question: it is read once for all."),
    ] = False,
) -> None:
    """Ask for a sentence at every depth of documents of every length; a heat map shows where it is found.

    Documents are read before the question is known. Ctrl-C stops and shows what is done.
    """
    from ragkit.bench.long_report import depth_cells
    from ragkit.bench.needle import NeedleTask, spaced_depths

    task = NeedleTask(spaced_depths(depths), together)
    size = task.documents
    job = LongJob(
        evaluation="needle",
        tasks=[task],
        rounds=[range(number * size, (number + 1) * size) for number in range(needles)],
        questions=1,
        rows="depth",
        cells=depth_cells,
        settings={"depths": depths, "needles": needles, "together": together},
    )
    evaluate(session, options, job)
