"""`ragkit config`: the settings in force."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import Enum
from typing import Annotated

import typer

from ragkit.cli.common import Session, command
from ragkit.cli.output import dim
from ragkit.setting_values import to_text
from ragkit.settings import Setting


def register(app: typer.Typer) -> None:
    """Add the group to `app`."""
    group = typer.Typer(help="Look at the settings.", no_args_is_help=True, rich_markup_mode=None)
    group.command("show")(command(show))
    app.add_typer(group, name="config")


def show(
    session: Session,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
) -> None:
    """Print every setting in force."""
    settings = session.settings()
    values = {item.key: {"value": _plain(item.value), "origin": item.origin} for item in settings.values}
    session.output.result({"settings": values}, _lines(settings.values, origin))


def _lines(values: tuple[Setting, ...], origin: bool) -> Iterator[str]:
    written = [f"{item.key} = {to_text(_plain(item.value))}" for item in values]
    width = max(len(text) for text in written)
    for item, text in zip(values, written, strict=True):
        yield f"{text:<{width}}  {dim('# ' + item.origin, sys.stdout)}" if origin else text


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bool | int | float | None):
        return value
    return list(value) if isinstance(value, tuple) else str(value)
