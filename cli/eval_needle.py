"""`ragkit eval needle`: whether a sentence is found wherever it stands in a long document."""

from __future__ import annotations

from typing import Annotated

import typer

from ragkit.cli.common import Session, command
from ragkit.cli.eval_long import (
    BudgetsOption,
    DataOption,
    GeneratorOption,
    LengthsOption,
    LongJob,
    LongOptions,
    OutOption,
    OwnPrefillOption,
    PlotOption,
    SeedOption,
    SelectorsOption,
    StrategiesOption,
    TimeLimitOption,
    evaluate,
)
from ragkit.cli.query_options import TopKOption


def register(group: typer.Typer) -> None:
    """Add the command to the group `eval`."""
    group.command("needle")(command(needle))


def needle(
    session: Session,
    lengths: LengthsOption = None,
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
    strategies: StrategiesOption = "full,rag",
    selectors: SelectorsOption = None,
    budgets: BudgetsOption = None,
    own_prefill: OwnPrefillOption = False,
    k: TopKOption = None,
    generator: GeneratorOption = None,
    data: DataOption = None,
    seed: SeedOption = 0,
    time_limit: TimeLimitOption = None,
    out: OutOption = None,
    plot: PlotOption = None,
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
    options = LongOptions(
        lengths, strategies, selectors, budgets, own_prefill, generator, k, data, seed, time_limit, out, plot
    )
    evaluate(session, options, job)
