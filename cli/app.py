"""Assembles the commands and turns whatever happens into an exit code. Entry point: `main`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from ragkit import __version__
from ragkit.cli import batch, bench, chunk, config, doctor, eval, export, ingest, models, query, search, store
from ragkit.cli.common import root
from ragkit.cli.errors import ExitCode, debugging, failure_of
from ragkit.cli.output import discard_stdout, json_text, printable
from ragkit.cli.signals import Interrupted, interruptible

#: One module a command group; each has `register(app)`. The order is that of the help.
COMMAND_GROUPS = (ingest, query, search, batch, chunk, store, export, bench, eval, models, config, doctor)

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 partly done, 4 store locked, damaged or full, 130/143 stopped."
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ragkit {__version__}")
        raise typer.Exit


@root
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Answer questions over document collections on this machine, with citations."""
    if context.invoked_subcommand is None:
        if context.obj.json:
            context.fail("Missing command")
        typer.echo(context.get_help())


app = typer.Typer(
    name="ragkit",
    rich_markup_mode=None,  # plain help starts three times as fast as boxed help
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.callback(invoke_without_command=True, epilog=EXIT_CODES)(_root)
for _group in COMMAND_GROUPS:
    _group.register(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code; never raises on purpose."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _let_streams_write_everything()
    try:
        with interruptible():
            result = typer.main.get_command(app).main(arguments, prog_name="ragkit", standalone_mode=False)
        return int(result or ExitCode.DONE)
    except Interrupted as stop:
        return _stopped(stop.exit_code, arguments)
    except BrokenPipeError:
        discard_stdout()
        return ExitCode.DONE
    except SystemExit as error:  # Typer ends completion requests this way
        return error.code if isinstance(error.code, int) else ExitCode.FAILED
    except Exception as error:
        return _failed(error, arguments)


def _failed(error: Exception, arguments: Sequence[str]) -> int:
    failure = failure_of(error)
    if debugging():
        traceback.print_exc(file=sys.stderr)
    _report(failure.code, failure.message, arguments)
    return failure.exit_code


def _stopped(exit_code: int, arguments: Sequence[str]) -> int:
    _report("interrupted", "stopped by a signal; nothing is half done, run the same command again", arguments)
    return exit_code


def _report(code: str, message: str, arguments: Sequence[str]) -> None:
    """Write one line to stderr, and with `--json` the error object to stdout."""
    sys.stderr.write(printable(f"error: {message}") + "\n")
    sys.stderr.flush()
    before_operands = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--json" in before_operands:
        sys.stdout.write(json_text({"error": {"code": code, "message": message}}))
        sys.stdout.flush()


def _let_streams_write_everything() -> None:
    """Escape what a stream cannot encode: a strange file name must not end a command half-way through its output."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
