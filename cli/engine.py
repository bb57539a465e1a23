"""The options that say what runs a job, for every command that runs one."""

from __future__ import annotations

from typing import Annotated

import typer

from ragkit.cli.common import flag
from ragkit.jobs_config import ExecutorName
from ragkit.settings import Flag

EngineOption = Annotated[
    ExecutorName | None, typer.Option("--engine", help="What runs the job: this machine, or a Ray cluster.")
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDR",
        help="The Ray cluster, such as 10.0.0.1:6379; auto finds one here. Without it one starts for the job.",
    ),
]


def engine_flags(engine: ExecutorName | None, ray_address: str | None) -> dict[str, Flag | None]:
    """Return the settings that the two options change."""
    return {"jobs.engine": flag(engine, "--engine"), "jobs.ray_address": flag(ray_address, "--ray-address")}
