"""The frontier of the chunking evaluation over several runs: their raw numbers merged into one figure.

    python benchmarks/chunking_frontier.py NAME [NAME ...] --out FILE.svg [--sets xquad ...]

NAME is a result of chunking_quality.py, or what `ragkit eval chunking --out` wrote (`benchmarks/results/NAME.json`),
with caps that are counted in tokens. Of a chunker under a cap that several runs measured, the first counts. It prints
what each run brought.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import RESULTS, markdown_table

from ragkit.bench.chunking_plots import plot_frontier
from ragkit.bench.chunking_quality import ChunkingReport
from ragkit.bench.chunking_rankings import Mode
from ragkit.bench.chunking_tables import CHROMA_ROWS, Best, ChromaRow, ComparisonRow, FrontierPoint
from ragkit.bench.question_sets import PUBLIC_SETS, Metric


def main() -> None:
    """Read the results, draw, and say what was in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=list(PUBLIC_SETS), default=list(PUBLIC_SETS))
    options = parser.parse_args()
    report, table = merged(options.names, options.sets)
    if not report.rows:
        sys.exit(f"none of {', '.join(options.names)} holds a run over {', '.join(options.sets)}")
    print(markdown_table(table, list(table[0])))
    plot_frontier(report, options.out)


def merged(names: Sequence[str], sets: Sequence[str]) -> tuple[ChunkingReport, list[dict[str, Any]]]:
    """Return the rows and points of all results over `sets`, in the order of `sets`, and one line a result and set."""
    rows: dict[tuple[str, str, int], ComparisonRow] = {}
    points: list[FrontierPoint] = []
    chroma: list[ChromaRow] = []
    table: list[dict[str, Any]] = []
    for name in names:
        stored = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        result = stored.get("result", stored)
        fresh = {key: row for key, row in _rows(result).items() if key not in rows and key[0] in sets}
        rows |= fresh
        points += [point for point in _points(result) if (point.data, point.chunker, point.cap) in fresh]
        chroma = chroma or _chroma(result)
        table += [
            {"result": name, "set": data, "runs": sum(key[0] == data for key in fresh)}
            for data in dict.fromkeys(key[0] for key in fresh)
        ]
    ordered = sorted(rows.values(), key=lambda row: list(sets).index(row.data))
    return ChunkingReport(ordered, chroma, points), table


def _rows(result: dict[str, Any]) -> dict[tuple[str, str, int], ComparisonRow]:
    found = [ComparisonRow(**{**row, "metric": Metric(row["metric"])}) for row in result["rows"]]
    return {(row.data, row.chunker, row.cap): row for row in found}


def _points(result: dict[str, Any]) -> list[FrontierPoint]:
    return [FrontierPoint(**{**point, "mode": Mode(point["mode"])}) for point in result["points"]]


def _chroma(result: dict[str, Any]) -> list[ChromaRow]:
    """Return the published rows of a result; only what was published is drawn, so ours may be missing."""
    best = {name: Best(0.0, "", 0) for name in ("near_recall", "near_iou", "hybrid_recall", "hybrid_iou")}
    return [ChromaRow(**{**best, **row}) for row in result["chroma"]][: len(CHROMA_ROWS)]


if __name__ == "__main__":
    main()
