"""Figures as files, drawn by matplotlib (the extra `plots`) without a screen; equal data give equal files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a format's metadata say of the moment and the program, which would make every file another one.
_METADATA = {
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}


def check_figure_path(path: Path) -> None:
    """Raise the error that drawing to `path` would end with; cheap, to be asked before anything long is run.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: the name ends with no known format, or its folder is missing.
    """
    if path.suffix.lower() not in _METADATA:
        raise UsageError(f"a plot is written as {', '.join(_METADATA)}; give one of these endings, got {path.name!r}")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} of the plot does not exist; create it first")
    if find_spec("matplotlib") is None:
        raise MissingExtraError(
            "plots need the package matplotlib, which is not installed; install it with: pip install 'ragkit[plots]'"
        )


def new_figure(width: float = 9.0, height: float = 4.5) -> Figure:
    """Return an empty figure of so many inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need the package matplotlib, which cannot be imported; install it with: pip install 'ragkit[plots]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`; the ending says the format.

    Raises:
        UsageError: the file cannot be written, or the ending is unknown.
    """
    check_figure_path(path)
    import matplotlib

    # Text stays text in SVG; a fixed salt makes its ids the same every time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ragkit"}):
        try:
            figure.savefig(path, metadata=_METADATA[path.suffix.lower()])
        except OSError as error:
            raise UsageError(f"the plot cannot be written to {path}: {error.strerror or error}") from error
