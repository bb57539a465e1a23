"""What every command shares: the common options, and the session that a command works in.

`command` adds the options to a command's signature, so that each is declared once and accepted before and after the
command's name.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragkit.cli.output import Output, printable
from ragkit.config import Device
from ragkit.settings import Flag, Settings, forbid_network, load_settings

if TYPE_CHECKING:
    from ragkit.pipeline import Pipeline

#: What `--chunker` takes, for the help; the registry itself is not imported for that.
CHUNKER_NAMES = (
    "recursive, sentence, token, balanced, structural, code, semantic, cluster, boundary_head, topic, "
    "perplexity, margin"
)


@dataclass(frozen=True, slots=True)
class CommonOptions:
    """The options of every command; None, False and 0 mean "not given here"."""

    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="Folder of the store. [env: RAGKIT_STORE; default: .ragkit]"),
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes: results and errors only.")] = (
        False
    )
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="More log lines; twice: all.")
    ] = 0
    offline: Annotated[
        bool, typer.Option("--offline", help="Fetch nothing; fail naming what is missing. [env: RAGKIT_OFFLINE]")
    ] = False
    device: Annotated[
        Device | None, typer.Option("--device", help="Where models run. [env: RAGKIT_DEVICE; default: auto]")
    ] = None
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings file. [default: ./ragkit.toml]")
    ] = None

    def over(self, other: CommonOptions) -> CommonOptions:
        """Return these options, with those of `other` (given before the command) where these were not given."""
        return CommonOptions(
            store=self.store or other.store,
            json=self.json or other.json,
            quiet=self.quiet or other.quiet,
            verbose=self.verbose + other.verbose,
            offline=self.offline or other.offline,
            device=self.device or other.device,
            config=self.config or other.config,
        )

    def flags(self) -> dict[str, Flag]:
        """Return the settings among these options."""
        flags: dict[str, Flag] = {}
        if self.store is not None:
            flags["store"] = Flag(str(self.store), "--store")
        if self.offline:
            flags["offline"] = Flag(True, "--offline")
        if self.device is not None:
            flags["device"] = Flag(self.device, "--device")
        return flags


class Session:
    """One run of one command: its output, and the settings and the pipeline when it asks for them."""

    def __init__(self, options: CommonOptions) -> None:
        self.options = options
        self.output = Output(json=options.json, quiet=options.quiet)
        _configure_logging(options, self.output)

    def settings(self, flags: Mapping[str, Flag | None] | None = None) -> Settings:
        """Return the settings in force; `flags` are the command's own options, None where not given.

        Takes effect on the environment as well: call it before anything heavy is imported.
        """
        given = {key: flag for key, flag in (flags or {}).items() if flag is not None}
        settings = load_settings(self.options.flags() | given, config_file=self.options.config)
        for warning in settings.warnings:
            logging.getLogger(__name__).warning("%s", warning)
        if settings.config.offline:
            forbid_network(os.environ)
        return settings

    def open(self, settings: Settings, *, create: bool = False) -> Pipeline:
        """Return the pipeline over the store, to be used in a `with` block.

        Raises:
            StoreMissingError: there is no store, and `create` is False.
        """
        from ragkit.pipeline import Pipeline

        return Pipeline.open(settings.store, settings.config, create=create)


def flag(value: object, option: str) -> Flag | None:
    """Return a command's option as a flag, or None where it was not given."""
    return None if value is None or value == [] else Flag(value, option)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return `function(session, ...)` as a Typer command that also takes the common options."""
    common = inspect.signature(CommonOptions, eval_str=True).parameters
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

    @functools.wraps(function)
    def run(context: typer.Context, **values: Any) -> None:
        options = CommonOptions(**{name: values.pop(name) for name in common})
        before = context.find_root().obj
        function(Session(options.over(before) if isinstance(before, CommonOptions) else options), **values)

    first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    _set_signature(run, [first, *own, *common.values()])
    return run


def root(function: Callable[..., None]) -> Callable[..., None]:
    """Return `function(context, ...)` as a Typer callback that keeps the common options given before a command."""
    common = inspect.signature(CommonOptions, eval_str=True).parameters
    own = list(inspect.signature(function, eval_str=True).parameters.values())

    @functools.wraps(function)
    def run(context: typer.Context, **values: Any) -> None:
        context.obj = CommonOptions(**{name: values.pop(name) for name in common})
        function(context, **values)

    _set_signature(run, [*own, *common.values()])
    return run


def _set_signature(run: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    keyword_only = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in parameters[1:]]
    signature = inspect.Signature([parameters[0], *keyword_only])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {item.name: item.annotation for item in parameters}


class _StderrHandler(logging.Handler):
    """Writes log lines to whatever stderr is now: progress bars replace it while they run."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._output.settle()
            sys.stderr.write(f"{record.levelname.lower()}: {printable(self.format(record))}\n")
        except Exception:
            self.handleError(record)


def _configure_logging(options: CommonOptions, output: Output) -> None:
    """Send the library's log to stderr, and keep other libraries' bars off the terminal."""
    level = logging.ERROR if options.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(options.verbose, 2)]
    logger = logging.getLogger("ragkit")
    logger.handlers = [_StderrHandler(output)]
    logger.setLevel(level)
    logger.propagate = False
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if options.verbose < 2:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
