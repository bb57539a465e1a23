"""`ragkit eval ruler`: RULER's thirteen tasks and key-value retrieval over long documents."""

from __future__ import annotations

from typing import Annotated

import typer

from ragkit.cli.common import Session, command
from ragkit.cli.eval_long import LongJob, LongOptions, evaluate, with_long_options
from ragkit.cli.measuring import listed_values


def register(group: typer.Typer) -> None:
    """Add the command to the group `eval`."""
    group.command("ruler")(command(with_long_options(ruler)))


def ruler(
    session: Session,
    options: LongOptions,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="NAME,NAME", help="Which tasks. [default: all fourteen]")
    ] = None,
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
    evaluate(session, options, job)
