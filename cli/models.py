"""`ragkit models`: the bundled models, and where any model's files are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from ragkit.cli.common import Session, command
from ragkit.cli.output import human_bytes, table
from ragkit.cli.progress import progress_for
from ragkit.errors import OfflineError

if TYPE_CHECKING:
    from ragkit.models import ModelInfo

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A bundled name, a folder or a hub id.")]


def register(app: typer.Typer) -> None:
    """Add the group to `app`."""
    group = typer.Typer(help="Fetch and find models.", no_args_is_help=True, rich_markup_mode=None)
    group.command("pull")(command(pull))
    group.command("list")(command(list_models))
    group.command("path")(command(path))
    app.add_typer(group, name="models")


def pull(
    session: Session,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Bundled names; without any, the two defaults.")
    ] = None,
) -> None:
    """Fetch bundled models, check them and make them ready. What is there already is left alone."""
    settings = session.settings()
    config = settings.config
    wanted = names or [config.embedding.model, config.generation.model]
    from ragkit.models import resolve

    pulled = {}
    for name in wanted:
        progress = progress_for(session.output)
        try:
            pulled[name] = str(resolve(name, offline=config.offline, progress=progress))
        finally:
            progress.close()
    lines = [f"{name}  {folder}" for name, folder in pulled.items()]
    session.output.result({"models": [{"name": name, "path": folder} for name, folder in pulled.items()]}, lines)


def list_models(session: Session) -> None:
    """List the bundled models."""
    session.settings()
    from ragkit.models import list_models as bundled

    found = bundled()
    rows = [_json(info) for info in found]
    session.output.result({"models": rows}, _lines(found))


def path(session: Session, name: NameArgument) -> None:
    """Print the folder of a model that is on this machine; fetches nothing."""
    session.settings()
    from ragkit.models import resolve

    try:
        folder = str(resolve(name, offline=True))
    except OfflineError as error:
        raise OfflineError(f"{name} is not on this machine; `ragkit models pull {name}` fetches it") from error
    session.output.result({"name": name, "path": folder}, [folder])


def _json(info: ModelInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "role": str(info.role),
        "path": None if info.path is None else str(info.path),
        "bytes": info.bytes,
        "licence": info.licence,
        "source": info.source,
    }


def _lines(found: Iterable[ModelInfo]) -> Iterable[str]:
    rows = [
        (info.name, str(info.role), human_bytes(info.bytes), info.licence, "yes" if info.path else "no", info.source)
        for info in found
    ]
    return table(("NAME", "ROLE", "SIZE", "LICENCE", "HERE", "SOURCE"), rows)
