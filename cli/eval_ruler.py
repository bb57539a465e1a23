"""`ragkit eval ruler`: RULER's thirteen tasks and key-value retrieval over long documents."""

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
from ragkit.cli.measuring import listed_values
from ragkit.cli.query_options import TopKOption


def register(group: typer.Typer) -> None:
    """Add the command to the group `eval`."""
    group.command("ruler")(command(ruler))


def ruler(
    session: Session,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="NAME,NAME", help="Which tasks. [default: all fourteen]")
    ] = None,
    lengths: LengthsOption = None,
    items: Annotated[int, typer.Option("--items", min=1, metavar="N", help="Documents for each task and length.")] = 5,
    questions: Annotated[
        int,
        typer.Option(
            "--questions",
            min=1,
            metavar="N",
            help="Questions about each document of kv_retrieval, niah_multikey_2 and niah_multikey_3.",
        ),
    ] = 1,
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
    """Score RULER's thirteen tasks, and key-value retrieval, at every length; the documents are made here.

    Documents are read before the question is known. Ctrl-C stops and shows what is done.
    """
    from ragkit.bench.long_report import task_cells
    from ragkit.bench.ruler_tasks import ruler_tasks

    chosen = ruler_tasks(listed_values("--tasks", tasks, str, "names"))
    job = LongJob(
        evaluation="ruler",
        tasks=chosen,
        rounds=[[number] for number in range(items)],
        questions=questions,
        rows="task",
        cells=task_cells,
        settings={"tasks": [task.name for task in chosen], "items": items, "questions": questions},
    )
    options = LongOptions(
        lengths, strategies, selectors, budgets, own_prefill, generator, k, data, seed, time_limit, out, plot
    )
    evaluate(session, options, job)
