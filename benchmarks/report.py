"""What every benchmark shares: facts about the machine, raw results as JSON, Markdown tables, honest statistics.

A benchmark is run as a script (`python benchmarks/NAME.py`), which puts this folder on the import path, so that
`from report import write_result` works. It prints one Markdown table and keeps its raw numbers in
`benchmarks/results/NAME.json` together with the machine, the versions and the commit that gave them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ragkit.bench.bootstrap import paired_bootstrap as paired_bootstrap
from ragkit.bench.machine import machine_facts, versions

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parent.parent


def write_result(name: str, payload: Mapping[str, Any]) -> Path:
    """Write `benchmarks/results/NAME.json` and return its path.

    `payload` (plain JSON values) stands under `result`; machine, versions, commit and date are added. The file is
    replaced as a whole, so that an interrupted benchmark leaves the earlier result.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine_facts(),
        "versions": versions(),
        "result": payload,
    }
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]) -> str:
    """Return `rows` as a Markdown table.

    `columns` names the keys in order, or maps each key to its heading. Numbers are right-aligned: a column is
    numeric where every value of it is a number. Floats are shown with three significant digits below 1000 and with
    thousands separators above. A missing value is a dash.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    numeric = {key: all(_is_number(row.get(key)) for row in rows if row.get(key) is not None) for key in headings}
    lines = [
        "| " + " | ".join(headings.values()) + " |",
        "|" + "|".join("---:" if numeric[key] else "---" for key in headings) + "|",
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(key)) for key in headings) + " |")
    return "\n".join(lines)


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Return the median wall-clock seconds of each function, measured in turns.

    Every round runs every function once, in an order that rotates, so that a machine that slows down slows all of
    them. The first `warmup` rounds are not counted.
    """
    samples = interleaved_samples(functions, rounds, warmup)
    return {name: statistics.median(values) for name, values in samples.items()}


def interleaved_samples(
    functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Return the wall-clock seconds of every counted round of each function; `interleaved` says how they are taken."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(warmup + rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            functions[name]()
            seconds = time.perf_counter() - started
            if turn >= warmup:
                samples[name].append(seconds)
    return samples


def percentiles(values: Iterable[float], *, at: Sequence[float] = (20, 50, 80)) -> dict[str, float]:
    """Return `{"p20": ..., "p50": ..., "p80": ...}` of `values` (linear interpolation)."""
    sample = np.asarray(list(values), dtype=np.float64)
    return {f"p{point:g}": float(np.percentile(sample, point)) for point in at}


def data_folder(name: str) -> Path | None:
    """Return the folder `name` of the benchmark data, or None where `RAGKIT_DATA` is unset or lacks it."""
    root = os.environ.get("RAGKIT_DATA")
    folder = Path(root) / name if root else None
    return folder if folder is not None and folder.is_dir() else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        size = abs(value)
        if size >= 1000 or size == 0:
            return f"{value:,.0f}"
        return f"{value:.0f}" if size >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "\\|")


def _lines(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def commit() -> str:
    """Return the commit at hand, with `+changes` where tracked files differ from it."""
    head = _lines("git", "rev-parse", "HEAD")
    if not head:
        return "unknown"
    changed = _lines("git", "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!docs")
    return head[0] + ("+changes" if changed else "")
