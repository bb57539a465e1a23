"""A plot of what a chunker went by along a text, with the boundaries that it chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ragkit.chunking.signals import BoundarySignals
from ragkit.figures import new_figure, save_figure
from ragkit.types import Chunk


def plot_signals(signals: BoundarySignals, chunks: Sequence[Chunk], path: Path, title: str = "") -> None:
    """Write a figure to `path`: the signal at every boundary, the cuts, and where the cap cut once more.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UsageError: the file cannot be written, or its ending is no known format.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    axes.plot(signals.offsets, signals.values, color="tab:blue", linewidth=0.8, label="signal")
    cuts = signals.offsets[signals.cut]
    axes.vlines(cuts, 0, 1, transform=axes.get_xaxis_transform(), color="tab:red", linewidth=0.4, alpha=0.6)
    axes.plot(cuts, signals.values[signals.cut], "o", color="tab:red", markersize=3, label="cut")
    chosen = set(cuts.tolist())
    # With an overlap a chunk starts before its cut, which is where the chunk before it ends.
    again = [chunk.char_stop for chunk in chunks[:-1] if chunk.char_stop not in chosen]
    if again:
        style = {"color": "tab:gray", "linewidth": 0.6, "linestyles": "dotted"}
        axes.vlines(again, 0, 1, transform=axes.get_xaxis_transform(), label="cut again for the cap", **style)
    if signals.threshold is not None:
        axes.axhline(signals.threshold, color="black", linewidth=0.6, linestyle="--", label="threshold")
    axes.set_xlabel("place in the text, characters")
    axes.set_ylabel(signals.measure)
    axes.set_title(title)
    axes.set_xlim(0, chunks[-1].char_stop if chunks else 1)
    axes.legend(loc="upper right", fontsize="small")
    save_figure(figure, path)
