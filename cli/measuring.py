"""What commands that measure for minutes share: listed values, places for results, an end that keeps what is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ragkit.cli.progress import progress_for
from ragkit.cli.signals import Interrupted
from ragkit.errors import UsageError

if TYPE_CHECKING:
    from ragkit.cli.output import Output

_Value = TypeVar("_Value")


class Measurement(Protocol):
    """What runs for minutes and keeps what it has found when it is stopped."""

    def run(self, progress: Any) -> object:
        """Measure everything."""
        ...


def run_measurement(measurement: Measurement, output: Output) -> int:
    """Measure, and return the exit code: 0, or that of the signal which stopped it."""
    progress = progress_for(output)
    try:
        measurement.run(progress)
    except Interrupted as stop:
        return stop.exit_code
    finally:
        progress.close()
    return 0


def listed_values(option: str, text: str | None, convert: Callable[[str], _Value], wanted: str) -> tuple[_Value, ...]:
    """Return a list separated by commas, without repetitions; empty where the option was not given.

    Raises:
        UsageError: `convert` refuses a part; the message says what is `wanted`.
    """
    if text is None:
        return ()
    try:
        return tuple(dict.fromkeys(convert(part.strip()) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"{option} takes {wanted}, separated by commas, got {text!r}") from error


def check_places(out: Path | None, plot: Path | None, check_plot: Callable[[Path], object]) -> None:
    """Raise where results could not be written: now rather than after minutes.

    Raises:
        UsageError: `out` is no place for a file; `check_plot` raises for `plot`.
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"--out: {out} is a folder, or lies in none")
    if plot is not None:
        check_plot(plot)


def write_results(out: Path, text: str) -> None:
    """Write results to `out`: all of them, or what stood there stays. A pipe or a device is written to as it is."""
    if out.exists() and not out.is_file():
        out.write_text(text, encoding="utf-8")
        return
    from ragkit.store.files import write_file_atomically

    write_file_atomically(out.resolve(), lambda temporary: _fill(temporary, text))


def _fill(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
